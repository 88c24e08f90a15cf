"""Adversarial training's two losses against formulas written out."""

import pytest
import torch
from torch import Tensor, nn

from robust_accel.objectives import Adversarial

NUM_CLASSES = 5


def by_hand(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy [B] with target probabilities [B, K], smoothed towards uniform."""
    target = (1 - smoothing) * target + smoothing / logits.shape[1]
    return -(target * (logits - logits.logsumexp(1, keepdim=True))).sum(1)


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))
    x = torch.rand(6, 3, 2, 2, dtype=torch.float64)
    x_adv = (x + 0.1 * torch.randn_like(x)).clamp(0, 1)
    return model.double(), x, x_adv


def targets(kind: str) -> tuple[Tensor, Tensor]:
    """The labels as they are passed, and as probabilities."""
    if kind == "classes":
        labels = torch.tensor([0, 1, 2, 3, 4, 0])
        return labels, nn.functional.one_hot(labels, NUM_CLASSES).double()
    soft = torch.rand(6, NUM_CLASSES, dtype=torch.float64).softmax(1)
    return soft, soft


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("clean_weight", [0.0, 0.5, 1.0])
def test_value_gradient_and_parts(problem, clean_weight, smoothing, kind):
    model, x, x_adv = problem
    labels, probabilities = targets(kind)
    objective = Adversarial(clean_weight=clean_weight, label_smoothing=smoothing)
    result = objective.loss(model, x, x_adv, labels)
    found = torch.autograd.grad(result["loss"], model.parameters())

    adv = by_hand(model(x_adv), probabilities, smoothing).mean()
    clean = by_hand(model(x), probabilities, smoothing).mean()
    expected = torch.autograd.grad(clean_weight * clean + adv, model.parameters())
    torch.testing.assert_close(result["loss"], clean_weight * clean + adv)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)

    torch.testing.assert_close(result["logits"], model(x_adv))
    torch.testing.assert_close(result["adv_loss"], adv)
    assert not result["adv_loss"].requires_grad
    assert ("clean_loss" in result) == (clean_weight > 0)
    if clean_weight:
        torch.testing.assert_close(result["clean_loss"], clean)
        assert not result["clean_loss"].requires_grad


@pytest.mark.parametrize(("clean_weight", "num_forwards"), [(0.0, 1), (1.0, 2)])
def test_clean_images_cost_a_forward_only_when_they_count(problem, clean_weight, num_forwards):
    model, x, x_adv = problem
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    Adversarial(clean_weight=clean_weight).loss(model, x, x_adv, targets("classes")[0])
    assert len(calls) == num_forwards


@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_inner_loss_is_a_plain_cross_entropy_an_image(problem, kind):
    model, x, x_adv = problem
    labels, probabilities = targets(kind)
    objective = Adversarial(clean_weight=0.5, label_smoothing=0.3)
    found = objective.inner_loss(model, x, labels)(x_adv)
    torch.testing.assert_close(found, by_hand(model(x_adv), probabilities))


BAD = [
    ({"clean_weight": -0.1}, "clean_weight"),
    ({"label_smoothing": 1.0}, "label_smoothing"),
    ({"label_smoothing": -0.1}, "label_smoothing"),
    ({"beta": 6.0}, "beta"),
]


@pytest.mark.parametrize(("settings", "named"), BAD)
def test_impossible_settings_are_refused_by_name(settings, named):
    with pytest.raises(ValueError, match=named):
        Adversarial(**settings)
