"""PGD against optima known in closed form."""

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robust_accel import RobustModel
from robust_accel.attacks import FGSMRS, NFGSM, PGD
from robust_accel.attacks.base import input_gradient

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


@pytest.mark.parametrize("random_start", [True, False])
def test_l1_optimum_of_a_linear_loss_within_the_box(random_start):
    w = torch.randn_like(X)
    attack = PGD(norm="l1", eps=1.25, step_size=0.3, num_steps=40, random_start=random_start)
    # half the range is open to each value: two and a half of the largest entries use up 1.25
    order = w.flatten(1).abs().argsort(dim=1, descending=True)
    signs, expected = w.flatten(1).sign(), X.flatten(1).clone()
    for rank, length in enumerate((0.5, 0.5, 0.25)):
        at = order[:, rank, None]
        expected.scatter_add_(1, at, length * signs.gather(1, at))
    found = attack(linear(w), X).flatten(1)
    gain = ((found - X.flatten(1)) * w.flatten(1)).sum(1)
    best = ((expected - X.flatten(1)) * w.flatten(1)).sum(1)
    assert (gain > 0.95 * best).all() and (gain <= best + 1e-5).all()


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


@pytest.mark.parametrize(
    ("options", "step_size"),
    [
        ({}, 2 / 255),
        ({"eps": 0.3}, 0.3 / 4),
        ({"norm": "l2", "eps": 1.0}, 0.25),
        ({"eps": 0.1, "num_steps": 20}, 0.1 / 8),
        ({"eps": 0.1, "num_steps": 1}, 0.1),
        ({"eps": 0.1, "num_steps": 2}, 0.1),
        ({"eps": 0.1, "step_size": 0.07}, 0.07),
    ],
)
def test_steps_follow_from_radius_and_number_where_not_given(options, step_size):
    attack = PGD(**options)
    assert attack.step_length == pytest.approx(step_size)
    assert attack.step_size == options.get("step_size")
    assert attack.fault is None


@pytest.mark.parametrize("num_steps", range(1, 31))
def test_the_rule_reaches_the_edge_of_every_ball_and_leaps_over_none(num_steps):
    for eps in (1e-4, 8 / 255, 1.0, 40.0):
        assert PGD(norm="l2", eps=eps, num_steps=num_steps).fault is None
        # and the least and the longest that a fault's own sentence allows
        for step in (eps / num_steps, 2 * eps):
            assert PGD(norm="l2", eps=eps, num_steps=num_steps, step_size=step).fault is None


@pytest.mark.parametrize(
    ("options", "doubt"),
    [
        ({"eps": 0.3, "step_size": 2 / 255}, r"10 steps of 0\.007843 get no further than 0\.07843"),
        (
            {"norm": "l2", "eps": 1.0, "step_size": 0.01},
            "from the start, in a ball of eps 1: leave it out",
        ),
        ({"eps": 0.01, "step_size": 0.1}, "leap over a ball of eps 0.01: leave it out"),
    ],
)
def test_steps_that_hardly_search_the_ball_are_told_where_they_train(options, doubt, caplog):
    attack = PGD(**options)
    assert re.search(f"^step_size: .*{doubt}", attack.fault)
    RobustModel(torch.nn.Linear(2, 2), attack)
    assert re.search(doubt, caplog.text)


def test_a_larger_ball_is_searched_as_far():
    weight = torch.tensor([[1.0, -1.0]])

    def loss_fn(x):
        return (x.flatten(1) * weight).sum(dim=1)

    x = torch.full((1, 1, 1, 2), 0.5)
    for eps in (0.1, 0.3, 0.45):
        x_adv = PGD(eps=eps)(loss_fn, x)
        torch.testing.assert_close(x_adv - x, eps * weight.view(1, 1, 1, 2))


@pytest.mark.parametrize("attack", [PGD(), FGSMRS(), NFGSM()])
def test_a_loss_that_is_not_one_number_an_image_is_refused(attack):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    x = torch.rand(4, 3, 2, 2)
    for loss_fn, found in ((net, r"\[4, 3\]"), (lambda x: net(x).sum(), r"\[\]")):
        with pytest.raises(ValueError, match=f"one loss an image, .4., got {found}"):
            attack(loss_fn, x)


def test_under_fp16_the_gradient_of_a_sure_image_is_no_zero() -> None:
    model, labels = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.tensor([0])
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1e-3], [-1e-3]]))
        model[1].bias.copy_(torch.tensor([11.5, 0.0]))

    def loss(z: Tensor) -> Tensor:
        return cross_entropy(model(z), labels, reduction="none")

    x = torch.full((1, 3, 2, 2), 0.5)
    exact = input_gradient(loss, x)
    with torch.autocast("cpu", dtype=torch.float16):
        found = input_gradient(loss, x)
    assert (found != 0).all()
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0)
