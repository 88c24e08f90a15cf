"""PGD against optima known in closed form."""

import pytest
import torch
from torch import Tensor

from robust_accel.attacks import PGD

X = torch.full((4, 3, 5, 5), 0.5)


def linear(w: Tensor):
    return lambda x: (w * x).sum((1, 2, 3))


@pytest.mark.parametrize("random_start", [True, False])
def test_linf_optimum_of_a_linear_loss(random_start):
    w = torch.randn_like(X)
    attack = PGD(eps=0.1, step_size=0.04, num_steps=6, random_start=random_start)
    torch.testing.assert_close(attack(linear(w), X), X + 0.1 * w.sign())


@pytest.mark.parametrize("random_start", [True, False])
def test_l2_optimum_of_a_linear_loss(random_start):
    w = torch.randn_like(X)
    optimum = X + 0.3 * w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    attack = PGD(norm="l2", eps=0.3, step_size=0.3, num_steps=25, random_start=random_start)
    torch.testing.assert_close(attack(linear(w), X), optimum, rtol=0, atol=1e-5)


def test_linf_optimum_at_the_border_of_the_box():
    x, w = torch.rand_like(X).round(), torch.randn_like(X)
    found = PGD(eps=0.1, step_size=0.04, num_steps=6)(linear(w), x)
    torch.testing.assert_close(found, (x + 0.1 * w.sign()).clamp(0, 1))


def test_a_step_has_the_length_of_step_size():
    w = torch.randn_like(X)
    step = PGD(eps=0.1, step_size=0.03, num_steps=1, random_start=False)(linear(w), X) - X
    torch.testing.assert_close(step, 0.03 * w.sign())
    attack = PGD(norm="l2", eps=0.1, step_size=0.03, num_steps=1, random_start=False)
    lengths = (attack(linear(w), X) - X).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((4,), 0.03), rtol=0, atol=1e-6)


def test_num_steps_is_the_number_of_gradients():
    calls = []

    def loss_fn(x: Tensor) -> Tensor:
        calls.append(x)
        return x.sum((1, 2, 3))

    PGD(num_steps=7)(loss_fn, X)
    assert len(calls) == 7


def test_returns_the_last_iterate_also_when_an_earlier_one_was_better():
    # from just above the top of the parabola each step overshoots to 0.09 below it and back
    x = X + 0.01
    attack = PGD(eps=0.5, step_size=0.1, num_steps=3, random_start=False)
    x_adv = attack(lambda x: -((x - 0.5) ** 2).sum((1, 2, 3)), x)
    torch.testing.assert_close(x_adv, X - 0.09)


def test_more_steps_reach_a_higher_loss():
    torch.manual_seed(1)
    w = torch.randn(20, 75)

    def curved(x: Tensor) -> Tensor:
        return (x.flatten(1) @ w.T).sin().sum(1)

    x = torch.rand(16, 3, 5, 5)
    means = [
        curved(PGD(eps=0.1, step_size=0.02, num_steps=n, random_start=False)(curved, x)).mean()
        for n in (1, 4, 16)
    ]
    assert means[0] < means[1] < means[2]
