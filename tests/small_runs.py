"""Runs of quickstart that take seconds, and one that is killed and goes on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.loop import Loop
from robust_accel.training.run import train

SMALL = (
    "train.epochs=3",
    "train.validate_every=1",
    "train.log_every=5",
    "attack.num_steps=2",
    "attack.step_size=0.1",
    "data.train_size=640",
    "data.test_size=100",
    "evaluate.autoattack=null",
    "evaluate.pgd.num_steps=5",
)


class Killed(Exception):
    pass


def run(folder: Path, *settings: str, resume: bool = False) -> dict:
    recipe = load_recipe("quickstart", [*SMALL, f"output={folder}", *settings])
    return train(recipe, resume=resume)


def quick_run(folder: Path, *settings: str, resume: bool = False) -> dict:
    """A second of training."""
    quick = ("data.train_size=250", "data.test_size=20", "train.batch_size=16")
    quick += ("train.validation_steps=1", "evaluate.pgd=null", "evaluate.train_images=null")
    return run(folder, *quick, *settings, resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def timeless(folder: Path) -> list[dict]:
    """The lines of ``metrics.jsonl``, but for what the clock says."""
    lines = RunFolder(folder).read_metrics()
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def resumes_exactly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fatal_step: int, *settings: str
) -> dict:
    """The report of a whole run, which one that was killed in a micro-batch ends like."""
    whole = quick_run(folder / "whole", *settings)
    step, calls = Loop.step, 0

    def deadly(*args):
        nonlocal calls
        calls += 1
        if calls == fatal_step:
            raise Killed
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", deadly)
        with pytest.raises(Killed):
            quick_run(folder / "killed", *settings)
    with RunFolder(folder / "killed").metrics.open("a") as file:
        file.write('{"step": 1')  # killed while it wrote a line
    torch.manual_seed(12345)  # whatever another process would have
    resumed = quick_run(folder / "killed", *settings, resume=True)
    assert same(weights(folder / "killed"), weights(folder / "whole"))
    assert timeless(folder / "killed") == timeless(folder / "whole")
    for key in ("steps", "selection", "parameters_digest", "function", "applied"):
        assert resumed[key] == whole[key]
    for key in ("clean_accuracy", "pgd_accuracy"):
        assert resumed.get(key, {}).get("outcomes") == whole.get(key, {}).get("outcomes")
    return whole
