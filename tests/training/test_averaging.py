"""The mean of epochs is that of their weights, resumes exactly, and is what is measured."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import quick_run, resumes_exactly, same, weights
from torch import nn

from robust_accel.recipe import RecipeError, TrainSettings, load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.averaging import EpochMean, make_average


@pytest.mark.parametrize("decay", [0.9, 0.995, 0.9999])
def test_a_moving_average_has_the_decay_that_was_asked_for(decay: float) -> None:
    """After as many steps as it averages; before, it is the mean of all so far."""
    average = make_average(TrainSettings(epochs=1, batch_size=1, ema_decay=decay), nn.Linear(1, 1))
    steps = round(1 / (1 - decay))
    assert average.get_decay(steps + 1) == decay
    for step in (1, 2, steps // 2):
        assert average.get_decay(step) == pytest.approx(1 - 1 / step)


def test_it_is_the_plain_mean_from_an_epoch_on_statistics_too() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    average = EpochMean(model, 3)
    states = []
    for epoch in range(1, 7):
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn_like(tensor.float()))
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        average.update(model, step=epoch)
        of_interest = states[2:] or states[-1:]
        for key, tensor in average.module.state_dict().items():
            if tensor.is_floating_point():
                expected = torch.stack([state[key] for state in of_interest]).mean(dim=0)
                torch.testing.assert_close(tensor, expected)
        if epoch <= 3:  # bit for bit
            assert all(average.module.state_dict()[k].equal(v) for k, v in states[-1].items())


def test_a_run_leaves_the_mean_and_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of the ends of epochs have the weights whose mean the run leaves."""
    settings = ("train.swa_start=2", "train.checkpoint_every=4", "train.keep=9")
    settings += ("train.eps_schedule={shape: sine}",)  # by the step: it goes on exactly, too
    report = resumes_exactly(tmp_path, monkeypatch, 10, *settings)
    folder = RunFolder(tmp_path / "whole")
    ends = [step for step in folder.steps() if (int(step.name[5:]) * 3) % report["steps"] == 0]
    epochs = [load_file(step / "model.safetensors") for step in ends]
    assert len(epochs) == 3
    left = weights(folder.path)
    for key, tensor in left.items():
        own = [epoch[f"classifier.model.{key}"] for epoch in epochs]
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (own[1] + own[2]) / 2)
            assert not tensor.equal(own[2])
    assert report["swa_start"] == 2 and "ema_decay" not in report["applied"]
    kept = load_file(ends[0] / "ema.safetensors")  # before the second epoch: as they are
    assert all(epochs[0][f"classifier.{key}"].equal(tensor) for key, tensor in kept.items())


@pytest.mark.long
def test_the_best_mean_is_kept_and_a_part_of_an_epoch_counts(tmp_path: Path) -> None:
    settings = ("train.swa_start=1", "train.select=best", "train.max_steps=2", "train.epochs=2")
    report = quick_run(tmp_path / "run", *settings)
    assert report["selection"]["epoch"] > 0 and report["doubts"] == []
    plain = quick_run(tmp_path / "plain", *settings[1:])
    grows = "train.eps_schedule={shape: sine}"
    (doubt,) = quick_run(tmp_path / "growing", *settings, grows)["doubts"]
    assert doubt.endswith("and the attack's eps would have been whole at epoch 2")
    assert same(weights(tmp_path / "run"), weights(tmp_path / "plain"))
    assert plain["steps"] == report["steps"] == 2


def test_what_training_has_not_come_to_is_told(tmp_path: Path) -> None:
    late = ("train.epochs=3", "train.max_steps=2", "train.swa_start=2")
    report = quick_run(tmp_path, *late, "train.awp={gamma: 0.01, warmup_epochs: 1}")
    perturbed, averaged = report["doubts"]
    assert perturbed.endswith("no weights were perturbed: train.awp.warmup_epochs is 1")
    assert averaged.endswith("no weights were averaged: train.swa_start is 2")


def test_a_perturbation_that_never_begins_is_refused() -> None:
    never = ["train.epochs=3", "train.awp={gamma: 0.01, warmup_epochs: 3}"]
    with pytest.raises(RecipeError, match=r"awp\.warmup_epochs: 3 leaves none of 3 epochs"):
        load_recipe("quickstart", never)


@pytest.mark.parametrize(
    ("key", "value"), [("eps_warmup_epochs", "4"), ("eps_schedule", "{shape: sine, epochs: 4}")]
)
def test_an_eps_that_is_never_whole_is_refused(key: str, value: str) -> None:
    said = rf"train\.{key}.*: 4 is after the last of 3 epochs: eps would never be whole"
    load_recipe("quickstart", [f"train.{key}={value}", "train.epochs=4"])
    with pytest.raises(RecipeError, match=said):
        load_recipe("quickstart", [f"train.{key}={value}", "train.epochs=3"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.swa_start=1", "train.ema_decay=0.9"], "choose one"),
        (["train.swa_start=99"], "99 is after the last of"),
        (["train.swa_start=0"], "greater than or equal to 1"),
    ],
)
def test_what_is_no_mean_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.swa_start: .*") as refused:
        load_recipe("quickstart", settings)
    assert said in str(refused.value)
