"""What the first step did: told, and an error where it was not what the recipe says."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from robust_accel import PGD, QSGD, AllReduce, RobustModel
from robust_accel.attacks import NoAttack
from robust_accel.comm import GradientCompression
from robust_accel.training import first_step
from robust_accel.training.first_step import check_first_step, in_words

X, LABELS = torch.rand(4, 3, 2, 2), torch.arange(4)


def model(attack=None) -> RobustModel:
    inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    return RobustModel(inner, PGD(num_steps=2) if attack is None else attack)


def test_it_tells_what_was_attacked_and_averaged(caplog):
    caplog.set_level("INFO")
    robust = model()
    robust(X, LABELS)
    found = check_first_step(robust, Accelerator(cpu=True), QSGD(), GradientCompression(), 0.5)
    assert found["attack"]["moved"] == 4
    assert found["ema_decay"] == 0.5
    assert "bytes_sent" not in found  # one process
    assert in_words(found) == "averaged with decay 0.5"
    (words,) = caplog.messages
    assert words.startswith("attacked 4 of 4 images, linf perturbation of eps 0.03137")


def test_standard_training_attacks_nothing_and_says_so(caplog):
    caplog.set_level("INFO")
    robust = model(NoAttack())
    robust(X, LABELS)
    found = check_first_step(
        robust, Accelerator(cpu=True), AllReduce(), GradientCompression(), None
    )
    assert found["attack"]["moved"] == 0 and in_words(found) == ""
    assert "attacked 0 of 4 images" in caplog.text


def test_a_model_that_was_never_attacked_is_an_error():
    robust = model()
    robust.eval()(X, LABELS)
    with pytest.raises(RuntimeError, match="no batch was attacked"):
        check_first_step(robust, Accelerator(cpu=True), AllReduce(), GradientCompression(), None)


@pytest.mark.parametrize(
    ("equal", "sent", "fault"),
    [
        (False, 10, "the parameters of 2 processes are not the same any more"),
        (True, 0, "QSGD.* sent nothing"),
    ],
)
def test_processes_that_drift_or_send_nothing_are_an_error(monkeypatch, equal, sent, fault):
    robust, compression = model(), GradientCompression()
    robust(X, LABELS)
    compression.meter.sent(sent)
    two = SimpleNamespace(num_processes=2)
    monkeypatch.setattr(first_step, "equal_parameters", lambda *_: equal)
    with pytest.raises(RuntimeError, match=fault):
        check_first_step(robust, two, QSGD(), compression, None)


class Root(nn.Module):
    """Its gradient is not finite at black pixels, nor anything where ``spoilt``."""

    def __init__(self, spoilt: bool = False) -> None:
        super().__init__()
        self.head, self.spoilt = nn.Linear(12, 5), spoilt

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.sqrt().flatten(1)) * (torch.nan if self.spoilt else 1)


def test_gradients_that_are_not_finite_are_told_and_counted(caplog):
    x = X.clamp(0.2, 1)
    x[:3, 0] = 0
    attack = PGD(num_steps=2, random_start=False)
    robust = RobustModel(Root(), attack, mean=0.0, std=1.0)
    robust(x, LABELS)
    found = check_first_step(robust, Accelerator(cpu=True), QSGD(), GradientCompression(), None)
    assert (found["attack"]["non_finite"], found["attack"]["moved"]) == (3, 4)
    assert "3 of 4 images met gradients or losses" in caplog.text
    assert "3 images met gradients or losses that are not finite" in str(robust.min_max.applied)
    honest = model(attack)
    honest(X, LABELS)
    assert honest.min_max.applied.non_finite == 0
    assert "finite" not in str(honest.min_max.applied)


def test_a_model_without_any_finite_gradient_is_an_error():
    robust = RobustModel(Root(spoilt=True), PGD(num_steps=2), mean=0.0, std=1.0)
    robust(X, LABELS)
    with pytest.raises(RuntimeError, match=r"attacks nothing.*zero or NaN everywhere .on 4 images"):
        robust(X, LABELS)


def test_an_attack_that_returns_no_numbers_is_an_error():
    def attack(loss_fn, x, *, generator=None):
        return torch.where(x == x[0], torch.nan, x)

    with pytest.raises(RuntimeError, match="returned pixels that are NaN"):
        model(attack)(X, LABELS)


def test_all_look_again_where_one_has_met_no_gradient_yet(monkeypatch: pytest.MonkeyPatch):
    """Else one would wait for the others' digests at the next step, and they for its gradient."""
    robust = model()
    robust(X, LABELS)
    parts = (robust, Accelerator(cpu=True), AllReduce(), GradientCompression(), None)
    assert check_first_step(*parts) is not None
    monkeypatch.setattr(first_step, "told_to_all", lambda own, _: [*own, False])
    assert check_first_step(*parts) is None
