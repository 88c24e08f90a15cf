"""Labels that are probabilities, as data.mix makes: in the attack, in the loss, or refused."""

import pytest
import torch
from torch import Tensor, nn

from robust_accel.attacks import PGD
from robust_accel.min_max import MinMax
from robust_accel.objectives import AWP, OBJECTIVES, Adversarial, Mart, Smoothing, Trades

TAKING = {
    "adversarial": Adversarial(clean_weight=0.5, label_smoothing=0.1),
    "trades": Trades(beta=2.0, label_smoothing=0.1),
    "trades, cross entropy": Trades(beta=2.0, attack_loss="cross_entropy"),
    "smoothing": Smoothing(sigma=0.1, num_noise=2, consistency=1.0),
}


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))
    return model.double(), torch.rand(6, 3, 2, 2).double(), torch.tensor([0, 1, 2, 3, 3, 0])


def solved(objective, model, x, labels, awp=None) -> tuple[Tensor, ...]:
    """The loss after attack, its gradient, and the parts that are told."""
    torch.manual_seed(1)
    min_max = MinMax(PGD(eps=0.1, num_steps=2), objective, weight_perturbation=awp)
    out = min_max.loss(model, x, labels)
    told = [value for value in out.values() if value.ndim == 0]
    return (*told, out["logits"], *torch.autograd.grad(out["loss"], model.parameters()))


@pytest.mark.parametrize("awp", [None, AWP(gamma=0.01)], ids=["", "awp"])
@pytest.mark.parametrize("name", TAKING)
def test_certain_probabilities_are_the_class(problem, name, awp):
    model, x, labels = problem
    certain = nn.functional.one_hot(labels, 4).double()
    one, other = (solved(TAKING[name], model, x, y, awp) for y in (labels, certain))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["adversarial", "trades", "smoothing"])
def test_a_mixed_label_is_the_mean_of_its_classes_losses(problem, name):
    """The terms with labels are linear in them."""
    model, x, labels = problem
    x_adv, other = (x + 0.1).clamp(0, 1), labels.roll(1)
    first, second = (nn.functional.one_hot(y, 4).double() for y in (labels, other))

    def loss(y: Tensor) -> Tensor:
        torch.manual_seed(2)  # of the noise
        return TAKING[name].loss(model, x, x_adv, y)["loss"]

    mixed = loss(0.3 * first + 0.7 * second)
    torch.testing.assert_close(mixed, 0.3 * loss(labels) + 0.7 * loss(other))


@pytest.mark.parametrize("name", ["adversarial", "smoothing"])
def test_the_attack_climbs_the_mixed_loss(problem, name):
    model, x, labels = problem
    mixed = (nn.functional.one_hot(labels, 4) + nn.functional.one_hot(labels.roll(1), 4)) / 2

    def climbed(y: Tensor) -> Tensor:
        torch.manual_seed(2)
        return TAKING[name].inner_loss(model, x, y)(x)

    found = climbed(mixed.double())
    assert found.shape == (6,)
    torch.testing.assert_close(found, (climbed(labels) + climbed(labels.roll(1))) / 2)


def test_who_takes_them_says_so():
    taking = {name for name, cls in OBJECTIVES.items() if getattr(cls, "takes_soft_labels", False)}
    assert taking == {"adversarial", "trades", "ikl", "smoothing"}


def test_mart_does_not(problem):
    model, x, labels = problem
    with pytest.raises(ValueError, match="MART needs class indices"):
        Mart().loss(model, x, x, nn.functional.one_hot(labels, 4).double())
