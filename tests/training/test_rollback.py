"""A run whose robust accuracy is gone goes back, on all processes; another way; not forever."""

import shutil
from pathlib import Path

import pytest
import torch
from launching import FSDP2, Forked, weights
from safetensors.torch import load_file
from small_runs import Killed, resumes_exactly, run
from training.test_finite_launch import ENGINES

from robust_accel.comm.fsdp2 import has_hooks
from robust_accel.recipe import RecipeError, load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.manifest import publish, read_whole
from robust_accel.training.run import _Run

# 8 steps an epoch, of which the third one breaks the model
SETTINGS = (
    "objective.name=faulty:Faulty",
    "objective.where=huge",
    "data.train_size=640",
    "data.validation_size=128",
    "data.test_size=20",
    "train.batch_size=64",
    "train.epochs=3",
    "train.validate_every=1",
    "train.select=best",
    "train.on_collapse=rollback",
    "train.checkpoint_every=3",
    "train.log_every=1",
    "optimizer.lr=0.03",
    "schedule={name: constant}",
    "attack.num_steps=2",
    "attack.step_size=0.1",
    "evaluate.pgd=null",
    "evaluate.autoattack=null",
    "evaluate.train_images=null",
)
ONCE = "objective.at=[24]"


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust_accel.training.run.write_report", lambda folder: None)


@pytest.mark.usefixtures("undrawn")
def test_it_goes_back_with_half_the_rate_and_ends_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (*SETTINGS, ONCE, "train.swa_start=3")
    report = run(tmp_path / "run", *settings)
    folder = RunFolder(tmp_path / "run")
    (why,) = report["rollbacks"]
    assert why.startswith("robust accuracy on the held-out split is gone: ")
    assert f"{why}; back from step 24 to 16, with half the rate (1 of at most 3)" in (caplog.text)
    assert report["steps"] == 24 and not report["stopped_early"] and report["doubts"] == []
    lines = [line for line in folder.read_metrics() if "lr" in line]
    assert [line["step"] for line in lines] == list(range(1, 25))  # none of the way that is left
    rates = [line["lr"] for line in lines]
    assert rates == pytest.approx([0.03] * 16 + [0.015] * 8)
    assert not list(folder.checkpoints.glob("*damaged*"))
    last = load_file(folder.steps()[-1] / "ema.safetensors")
    assert all(tensor.abs().max() < 1e10 for tensor in last.values())


@pytest.mark.usefixtures("undrawn")
def test_raw_weights_that_collapse_are_seen_behind_a_sound_average(tmp_path: Path) -> None:
    spoils = ("objective={name: leaning:Leaning, at: [24]}", "train.ema_decay=0.999")
    settings = [s for s in SETTINGS if not s.startswith("objective.")]
    report = run(tmp_path / "run", *settings, *spoils, "train.on_collapse=stop", "train.epochs=4")
    line = RunFolder(tmp_path / "run").read_metrics()[-1]
    assert line["validation_raw_robust_accuracy"] < 0.2 < line["validation_robust_accuracy"]
    (doubt,) = report["doubts"]
    assert doubt.startswith("robust accuracy on the held-out split is gone: ")
    assert report["stopped_early"] and report["steps"] == 24


@pytest.mark.long
@pytest.mark.usefixtures("undrawn")
def test_it_does_not_go_back_forever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    again = f"objective.at={list(range(24, 99))}"
    report = run(tmp_path / "run", *SETTINGS, again, "train.max_rollbacks=2", "train.epochs=6")
    assert len(report["rollbacks"]) == 2
    assert report["stopped_early"] and report["selection"]["epoch"] == 2
    assert report["steps"] == 24
    said = caplog.text
    assert "(2 of at most 2)" in said and said.count("; training ends here") == 1


@pytest.mark.long
def test_a_run_that_has_gone_back_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the 6th step after it; the objective counts anew, and breaks nothing any more."""
    report = resumes_exactly(tmp_path, monkeypatch, 30, *SETTINGS, ONCE)
    assert len(report["rollbacks"]) == 1


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("action", ["rollback", "stop"])
def test_a_fall_in_a_validation_that_was_stopped_is_no_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    """It is the last one, and done when the run goes on."""
    validate, folder = _Run.validate, tmp_path / "run"

    def deadly(self: _Run, epoch: int) -> None:
        if epoch == 3:
            raise Killed
        validate(self, epoch)

    settings = (*SETTINGS, ONCE, f"train.on_collapse={action}")
    with monkeypatch.context() as patch:
        patch.setattr(_Run, "validate", deadly)
        with pytest.raises(Killed):
            run(folder, *settings)
    report = run(folder, *settings, resume=True)
    assert report["steps"] == 24
    assert (len(report["rollbacks"]), report["stopped_early"]) == (
        (1, False) if action == "rollback" else (0, True)
    )


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_two_processes_go_back_together(tmp_path: Path, engine: str) -> None:
    """What each keeps of its images goes back, and what is averaged, too."""
    if engine == "fsdp2" and not has_hooks():
        pytest.skip("refused before torch 2.9")
    settings = [s for s in SETTINGS if not s.startswith("attack.")]
    settings += ["data.sharding=fixed", "attack={name: fgsm-pgi, eps: 0.03, prior_weight: 0}"]
    settings += ["objective.where=steep", "optimizer={name: sgd, lr: 0.03}", ONCE]
    settings += ["train.swa_start=2"]
    command = ("train", "quickstart", *settings, f"output={tmp_path / 'run'}")
    engines = ENGINES | {"fsdp2": FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "PreActBlock"}}
    code, output = Forked(*command, environment=engines[engine]).wait()
    assert code == 0, output
    assert output.count("back from step 24 to 16, with half the rate") == 1
    report = RunFolder(tmp_path / "run").read_report()
    assert report["steps"] == 24 and len(report["rollbacks"]) == 1
    assert all(tensor.abs().max() < 1e10 for tensor in weights(tmp_path / "run").values())


@pytest.fixture(scope="module")
def warned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has met a collapse at its end, and gone on."""
    folder = tmp_path_factory.mktemp("runs") / "warned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robust_accel.training.run.write_report", lambda folder: None)
        report = run(folder, *SETTINGS, ONCE, "train.on_collapse=warn")
    assert len(report["doubts"]) == 1 and not report["stopped_early"]
    return folder


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("action", ["warn", "stop", "rollback"])
def test_a_run_that_was_warned_goes_on_as_the_recipe_says_now(
    tmp_path: Path, warned: Path, action: str
) -> None:
    shutil.copytree(warned, tmp_path / "run")
    more = (*SETTINGS, ONCE, f"train.on_collapse={action}", "train.max_rollbacks=5")
    report = run(tmp_path / "run", *more, resume=True)
    ends = {"warn": (0, False, 1), "stop": (0, True, 1), "rollback": (1, False, 0)}[action]
    assert (len(report["rollbacks"]), report["stopped_early"], len(report["doubts"])) == ends
    assert report["steps"] == 24


@pytest.mark.usefixtures("undrawn")
def test_it_is_refused_where_no_checkpoint_from_before_is_kept(
    tmp_path: Path, warned: Path
) -> None:
    """As of earlier versions, which kept it by rollback alone."""
    shutil.copytree(warned, tmp_path / "run")
    (*_, step) = RunFolder(tmp_path / "run").steps()
    manifest, new = read_whole(step), step.with_name("incomplete-new")
    shutil.copytree(step, new)
    state = torch.load(new / "progress.pt", weights_only=True)
    state["progress"]["good_step"] = 0
    torch.save(state, new / "progress.pt")
    publish(new, step, manifest["files"], manifest["about"])
    said = r"train\.on_collapse: rollback: .*no checkpoint from before"
    with pytest.raises(RecipeError, match=said):
        run(tmp_path / "run", *SETTINGS, ONCE, resume=True)


def test_what_validations_attack_by_stays(warned: Path) -> None:
    """Nothing given is PGD; weights are chosen by it."""
    other = ("train.on_collapse=warn", "evaluate.pgd={attack: apgd}")
    with pytest.raises(ValueError, match=r"evaluate\.pgd\.attack: 'pgd', now 'apgd'"):
        run(warned, *SETTINGS, ONCE, *other, resume=True)


def test_it_needs_weights_to_choose_from() -> None:
    with pytest.raises(RecipeError, match=r"train\.on_collapse: rollback leaves .*choose best"):
        load_recipe("quickstart", ["train.on_collapse=rollback", "train.select=last"])
