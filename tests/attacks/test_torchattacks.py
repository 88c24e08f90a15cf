"""The same images as torchattacks on a timm network, from the same start."""

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from robust_accel.attacks import FGSMRS, PGD
from robust_accel.models import PixelClassifier

torchattacks = pytest.importorskip("torchattacks")


@pytest.fixture(scope="module")
def problem():
    """Double precision: two ways to write a sum must not flip the sign of a gradient."""
    torch.manual_seed(0)
    model = PixelClassifier(timm.create_model("test_resnet", num_classes=10)).double().eval()
    x, labels = torch.rand(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    return model, x, labels, lambda x: cross_entropy(model(x), labels, reduction="none")


def agree(found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    assert (expected - x).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_linf(problem, random_start):
    model, x, labels, loss_fn = problem
    theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=5, random_start=random_start)
    torch.manual_seed(3)
    expected = theirs(x, labels)
    torch.manual_seed(3)
    ours = PGD(step_size=2 / 255, num_steps=5, random_start=random_start)
    agree(ours(loss_fn, x), expected, x)


def test_pgd_l2(problem):
    model, x, labels, loss_fn = problem
    theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.2, steps=5, random_start=False)
    attack = PGD(norm="l2", eps=0.5, step_size=0.2, num_steps=5, random_start=False)
    # they add 1e-10 to the gradient's norm
    found = attack(loss_fn, x)
    torch.testing.assert_close(found, theirs(x, labels), rtol=0, atol=1e-6)
    assert (found - x).flatten(1).norm(dim=1) == pytest.approx([0.5] * 4, rel=0.01)


def test_pgd_l2_attains_as_much_from_a_random_start(problem):
    # their start is not uniform in the ball (radius without the root), so images differ
    model, x, labels, loss_fn = problem
    theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.2, steps=5)(x, labels)
    ours = PGD(norm="l2", eps=0.5, step_size=0.2, num_steps=5)(loss_fn, x)
    with torch.no_grad():
        gains = [(loss_fn(x_adv) - loss_fn(x)).mean().item() for x_adv in (ours, theirs)]
    assert gains[0] == pytest.approx(gains[1], rel=0.1)


def test_fgsm_rs(problem, monkeypatch):
    model, x, labels, loss_fn = problem
    # they draw normal numbers and overwrite them by uniform ones: drop the first draw
    monkeypatch.setattr(torch, "randn_like", torch.empty_like)
    torch.manual_seed(3)
    expected = torchattacks.FFGSM(model, eps=8 / 255, alpha=10 / 255)(x, labels)
    torch.manual_seed(3)
    agree(FGSMRS(eps=8 / 255)(loss_fn, x), expected, x)
