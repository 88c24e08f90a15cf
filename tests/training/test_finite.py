"""NaN and Inf at every kind of moment: what is kept is finite, and the run says what was not."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3

from robust_accel.recipe import TrainSettings, load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.checkpoint import Progress
from robust_accel.training.finite import Watch
from robust_accel.training.manifest import publish, read_whole
from robust_accel.training.run import train

TINY = (
    "objective.name=faulty:Faulty",
    "data.train_size=112",  # 16 of them held out: 6 steps an epoch
    "data.validation_size=16",
    "data.test_size=20",
    "train.batch_size=16",
    "train.epochs=2",
    "train.validate_every=1",
    "train.log_every=50",
    "train.validation_steps=2",
    "attack.num_steps=2",
    "attack.step_size=0.1",
    "optimizer.lr=0.01",
    "evaluate.autoattack=null",
    "evaluate.train_images=null",
    "evaluate.pgd.num_steps=2",
)


def run(folder: Path, *settings: str, resume: bool = False) -> dict[str, Any]:
    recipe = load_recipe("quickstart", [*TINY, f"output={folder}", *settings])
    return train(recipe, resume=resume)


def tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors(part)


def check_finite(folder: Path) -> None:
    """All that a run has kept, and its metrics are JSON."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("optimizer.bin")]
    for path in files:
        load = load_file if path.suffix == ".safetensors" else torch.load
        assert all(tensor.isfinite().all() for tensor in tensors(load(path))), path

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for path in folder.glob("*.json*"):
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for text in texts:
            json.loads(text, parse_constant=refuse)


def fault(at: int, where: str = "loss", number: str = "nan") -> list[str]:
    return [f"objective.at=[{at}]", f"objective.where={where}", f"objective.number={number}"]


@pytest.mark.parametrize(
    ("settings", "kept", "said"),
    [
        pytest.param(fault(1), [], "the loss since step 1, the gradient since step 1", id="first"),
        pytest.param(fault(8), [6], "the loss since step 8, the gradient", id="between-lines"),
        pytest.param(fault(12), [6], "the loss since step 12", id="last"),
        pytest.param(fault(12, "gradient"), [6], "the gradient since step 12", id="grad"),
        pytest.param(
            fault(12, "gradient", "inf"), [6], "the gradient since step 12", id="infinite"
        ),
        pytest.param(fault(12, "weight"), [6], "parameter", id="weight"),
        pytest.param(fault(12, "buffer", "inf"), [6], "running_var", id="buffer"),
        pytest.param(fault(9, "value"), [6], "the loss since step 9;", id="value"),
        pytest.param(
            [*fault(15), "train.gradient_accumulation=2"], [6], "loss since step 8", id="micro"
        ),
        pytest.param(
            [*fault(12), "train.checkpoint_every=4", "train.max_grad_norm=1.0"],
            [6, 8], "the loss since step 12, the gradient", id="clipped",
        ),
        pytest.param(
            ["optimizer.name=sgd", "optimizer.lr=1e30"], [], "since step 2", id="explosion"
        ),
    ],
)  # fmt: skip
def test_what_is_kept_is_finite_and_the_run_says_what_was_not(
    tmp_path: Path, settings: list[str], kept: list[int], said: str
) -> None:
    with pytest.raises(FloatingPointError) as error:
        run(tmp_path, *settings)
    assert said in str(error.value)
    steps = RunFolder(tmp_path).steps()
    assert [path.name for path in steps] == [f"step-{number:08d}" for number in kept]
    assert (f"the last good checkpoint is {steps[-1]}" if kept else "no checkpoint") in str(
        error.value
    )
    assert not (tmp_path / "model").exists()
    assert RunFolder(tmp_path).read_metrics()
    check_finite(tmp_path)


def test_a_step_that_is_skipped_leaves_all_as_it_was(tmp_path: Path) -> None:
    """After two steps that count and two that don't, all is as after two."""
    settings = ["schedule.name=constant", "train.ema_decay=0.5", "evaluate.pgd=null"]
    skip = ["train.on_nonfinite=skip", "train.log_every=1", "objective.at=[3,4]"]
    found = _state(tmp_path / "skips", *settings, *skip, "train.max_steps=4")
    expected = _state(tmp_path / "two", *settings, "train.max_steps=2")
    assert all(found[key].equal(expected[key]) for key in found | expected)
    report = RunFolder(tmp_path / "skips").read_report()
    assert (report["skipped_steps"], report["steps"]) == (2, 4)
    check_finite(tmp_path / "skips")
    lines = [line for line in RunFolder(tmp_path / "skips").read_metrics() if "lr" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2]
    assert ["loss" in line for line in lines] == [True, True, False, False]
    assert not any("nonfinite" in line for line in lines)


def _state(folder: Path, *settings: str) -> dict[str, torch.Tensor]:
    """Of weights, averages, buffers and optimizer after a run."""
    run(folder, *settings)
    (step,) = RunFolder(folder).steps()
    found = {f"ema.{k}": v for k, v in load_file(step / "ema.safetensors").items()}
    found |= load_file(step / "model.safetensors")
    for i, tensor in enumerate(tensors(torch.load(step / "optimizer.bin"))):
        found[f"optimizer.{i}"] = tensor
    return found


def test_too_many_skipped_in_a_row_end_the_run(tmp_path: Path) -> None:
    bad = ["objective.at=[2,4,5,8,9,10]", "train.on_nonfinite=skip", "train.max_skipped_in_a_row=2"]
    with pytest.raises(FloatingPointError, match=r"steps 8 to 10 all met .* allows 2; the last"):
        run(tmp_path, *bad)
    check_finite(tmp_path)


def test_a_run_that_stopped_goes_on_and_skips(tmp_path: Path) -> None:
    settings = ["objective.at=[5,8]", "objective.number=inf", "train.checkpoint_every=4"]
    with pytest.raises(FloatingPointError, match=r"--resume train\.on_nonfinite=skip goes on"):
        run(tmp_path, *settings)
    (step,) = RunFolder(tmp_path).steps()
    assert step.name == "step-00000004"
    report = run(tmp_path, *settings, "train.on_nonfinite=skip", resume=True)
    assert (report["steps"], report["skipped_steps"]) == (12, 2)  # its fifth and eighth
    check_finite(tmp_path)


def test_what_was_kept_and_is_not_finite_is_refused(tmp_path: Path) -> None:
    settings = ["train.epochs=1", "train.select=best"]
    run(tmp_path, *settings)
    (step,) = RunFolder(tmp_path).steps()
    state = load_file(step / "model.safetensors")
    next(t for t in state.values() if t.ndim > 1).fill_(math.nan)
    manifest = read_whole(step)
    spoilt = step.rename(step.with_name("spoilt"))
    save_file(state, spoilt / "model.safetensors", metadata={"format": "pt"})
    publish(spoilt, step, manifest["files"], manifest["about"])  # as if a run had kept it
    with pytest.raises(FloatingPointError, match=rf"{step} holds numbers .*: remove it"):
        run(tmp_path, *settings, resume=True)


def test_a_moving_average_that_is_not_finite_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = ModelEmaV3.update

    def spoils(self: ModelEmaV3, model: torch.nn.Module, step: int) -> None:
        update(self, model, step=step)
        if step == 9:
            next(self.module.parameters()).data.fill_(math.inf)

    monkeypatch.setattr(ModelEmaV3, "update", spoils)
    with pytest.raises(FloatingPointError, match=r"finite: moving average of stem\.weight"):
        run(tmp_path, "train.ema_decay=0.9")
    assert [path.name for path in RunFolder(tmp_path).steps()] == ["step-00000006"]
    check_finite(tmp_path)


def test_optimizer_state_that_is_not_finite_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = torch.optim.SGD.step, []

    def spoils(self: torch.optim.SGD, closure: None = None) -> None:
        step(self, closure)
        calls.append(1)
        if len(calls) == 12:
            self.state[self.param_groups[0]["params"][1]]["momentum_buffer"].fill_(math.inf)

    monkeypatch.setattr(torch.optim.SGD, "step", spoils)
    with pytest.raises(FloatingPointError, match=r"finite: optimizer's momentum_buffer of "):
        run(tmp_path, "optimizer.name=sgd", "optimizer.momentum=0.9")
    assert [path.name for path in RunFolder(tmp_path).steps()] == ["step-00000006"]


def test_weights_that_are_large_and_masks_of_infinity_are_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Squares of 3e19 are infinite in fp32; a triangle of -inf is how attention is masked."""
    from robust_accel.models import PixelClassifier

    init = PixelClassifier.__init__

    def masked(self: PixelClassifier, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))

    with monkeypatch.context() as patch:
        patch.setattr(PixelClassifier, "__init__", masked)
        settings = ["train.epochs=1", "evaluate.pgd=null", "train.ema_decay=0.5"]
        run(tmp_path, *settings, *fault(6, "huge"))
    (step,) = RunFolder(tmp_path).steps()
    assert max(t.abs().max() for t in load_file(step / "model.safetensors").values()) > 1e18


def test_validation_by_a_model_without_an_answer_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are finite, its logits are not: it is no best, not even the first."""
    from robust_accel.models import PixelClassifier

    forward = PixelClassifier.forward

    def speechless(self: PixelClassifier, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x) + (0 if self.training or len(x) != 15 else math.nan)

    monkeypatch.setattr(PixelClassifier, "forward", speechless)
    with pytest.raises(FloatingPointError, match="of 15 held-out images the model answers none"):
        run(tmp_path, "data.validation_size=15", "train.select=best")
    assert not RunFolder(tmp_path).best.exists()
    check_finite(tmp_path)


def test_robust_accuracy_that_is_gone_is_told_at_once_and_in_the_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["data.train_size=640", "data.validation_size=128", "train.batch_size=64"]
    settings += ["train.epochs=3", "evaluate.pgd=null", "optimizer.lr=0.03"]
    report = run(tmp_path, *settings, "objective.at=[24]", "objective.where=huge")
    (doubt,) = report["doubts"]
    assert doubt.startswith("robust accuracy on the held-out split is gone: ")
    assert doubt in caplog.messages


def test_training_ends_where_robust_accuracy_is_gone_with_the_weights_from_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["data.train_size=640", "data.validation_size=128", "train.batch_size=64"]
    settings += ["train.epochs=5", "evaluate.pgd=null", "optimizer.lr=0.03", "train.select=best"]
    fault = ["objective.at=[24]", "objective.where=huge"]
    with pytest.raises(ValueError, match=r"train\.on_collapse: stop .*select is last"):
        run(tmp_path, *settings[:-1], "train.on_collapse=stop", *fault)
    report = run(tmp_path / "run", *settings, "train.on_collapse=stop", *fault)
    assert report["stopped_early"]
    assert report["selection"]["epoch"] < report["epochs"] < 5
    assert report["doubts"][0] + "; training ends here" in caplog.messages


def test_what_a_loss_scaler_leaves_out_is_counted_and_no_reason_to_stop(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)  # it has no buffers
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    settings = TrainSettings(epochs=1, batch_size=1, precision="fp16", max_skipped_in_a_row=2)
    progress = Progress()
    watch = Watch(accelerator, settings, RunFolder(tmp_path), progress, model, optimizer, None)
    watch.start()

    def step(scale: float) -> bool:
        loss = model(torch.ones(2)).sum()
        (scaler.scale(loss) * scale).backward()
        assert watch.allows(loss, None)
        optimizer.step()
        optimizer.zero_grad()
        return watch.settle()

    assert [step(math.inf), step(1.0), step(math.inf), step(math.inf)] == [
        False,
        True,
        False,
        False,
    ]
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (3, 2)
    watch.check()
    with pytest.raises(FloatingPointError, match="allows 2; there is no checkpoint yet"):
        step(math.inf)
