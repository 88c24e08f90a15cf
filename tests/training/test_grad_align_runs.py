"""GradAlign in whole runs: on two processes, and resumed exactly."""

from functools import partial
from pathlib import Path

import pytest
import torch
from launching import SMALL, Forked, killed_and_resumed
from small_runs import resumes_exactly
from training.test_finite_launch import ENGINES

from robust_accel.run_folder import RunFolder

FGSM = "attack={name: pgd, eps: 0.2, num_steps: 1, random_start: false}"
GROWING = ("objective.grad_align={eps: null}", "train.eps_schedule={shape: sine}")


FIXED = pytest.param(("objective.grad_align={eps: 0.2}",), marks=pytest.mark.long)


@pytest.mark.parametrize("settings", [FIXED, GROWING], ids=["fixed", "growing"])
def test_a_run_with_it_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    resumes_exactly(tmp_path, monkeypatch, 10, "train.checkpoint_every=3", FGSM, *settings)
    lines = RunFolder(tmp_path / "whole").read_metrics()
    found = [line["grad_alignment"] for line in lines if "loss" in line]
    assert found and all(-1 <= cosine <= 1 for cosine in found)


SCRIPT = """
import copy, sys
from pathlib import Path

import scripts
import torch
from accelerate import Accelerator

from robust_accel import PGD, RobustModel
from robust_accel.objectives import Adversarial, GradAlign

accelerator = Accelerator()
torch.manual_seed(0)
attack = PGD(eps=0.2, num_steps=1, random_start=False)
objective = Adversarial(grad_align=GradAlign(eps=None))
robust = RobustModel(scripts.network(), attack, objective)
alone, data = copy.deepcopy(robust), scripts.Batches(0, 1)


def gradients(model, part):
    torch.manual_seed(part)
    model.zero_grad()
    rows = slice(16 * part, 16 * part + 16)
    accelerator.backward(model(data.images[rows], data.labels[rows])["loss"])
    return [p.grad.clone() for p in model.parameters()]


together = gradients(accelerator.prepare(robust), accelerator.process_index)
each = [gradients(alone, part) for part in range(2)]
torch.save((together, each), Path(sys.argv[1]) / f"{accelerator.process_index}.pt")
accelerator.end_training()
"""


@pytest.mark.launch
def test_processes_have_the_mean_of_their_gradients(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    code, output = Forked(tmp_path, script=script).wait()
    assert code == 0, output
    for rank in range(2):
        together, each = torch.load(tmp_path / f"{rank}.pt")
        for own, *parts in zip(together, *each, strict=True):
            torch.testing.assert_close(own, (parts[0] + parts[1]) / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.launch
@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_processes_resume_exactly(tmp_path: Path, engine: str) -> None:
    whole, settings = tmp_path / "whole", (*SMALL, FGSM, *GROWING, "train.validate_every=9")
    start = partial(Forked, "train", "quickstart", *settings, environment=ENGINES[engine])
    code, output = start(f"output={whole}").wait()
    assert code == 0, output
    assert RunFolder(whole).read_report()["applied"]["processes_with_equal_parameters"] == 2
    killed_and_resumed(whole, tmp_path / "killed", start)
