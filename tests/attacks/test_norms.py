"""Start, direction and projection of the three balls."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import L1_projection
from scipy.optimize import minimize
from torch import Tensor

from robust_accel.attacks.norms import (
    ascent_direction,
    lengths,
    project,
    random_start,
    sparse_direction,
)

NUM_DRAWS = 20_000


def ks_distance(values: Tensor) -> float:
    """Kolmogorov-Smirnov distance to the uniform distribution on [0, 1]."""
    values = values.double().sort().values
    grid = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    return torch.maximum(values - grid[:-1], grid[1:] - values).max().item()


def assert_uniform(values: Tensor) -> None:
    # P(distance > 2.2 / sqrt(n)) = 2 exp(-2 * 2.2^2) = 1.3e-4
    assert ks_distance(values) < 2.2 / len(values) ** 0.5


def test_linf_start_is_uniform_in_the_ball():
    delta = random_start(torch.empty(NUM_DRAWS, 1, 1, 2), 0.1, "linf").flatten(1)
    for pixel in delta.T:
        assert_uniform(pixel / 0.2 + 0.5)
    assert torch.corrcoef(delta.T)[0, 1].abs() < 0.03  # pixels are independent


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (2, 3, 4)])
def test_l2_start_has_a_radius_uniform_in_volume(shape):
    delta = random_start(torch.empty(NUM_DRAWS, *shape), 0.7, "l2").flatten(1)
    assert_uniform((delta.norm(dim=1) / 0.7) ** delta.shape[1])


def test_l2_start_has_a_uniform_direction():
    delta = random_start(torch.empty(NUM_DRAWS, 3, 1, 1), 0.7, "l2").flatten(1)
    unit = delta / delta.norm(dim=1, keepdim=True)
    for coordinate in unit.T:  # Archimedes: each coordinate on the sphere in R^3 is uniform
        assert_uniform(coordinate / 2 + 0.5)
    assert (unit.T @ unit / NUM_DRAWS - torch.eye(3) / 3).abs().max() < 0.02


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 1), (2, 3, 4)])
def test_l1_start_is_uniform_in_the_ball(shape):
    delta = random_start(torch.empty(NUM_DRAWS, *shape), 0.7, "l1").flatten(1)
    d = delta.shape[1]
    assert_uniform((delta.norm(1, dim=1) / 0.7) ** d)
    # of what a uniform direction has: an entry's share s of the length is Beta(1, d - 1)
    share = (delta / delta.norm(1, dim=1, keepdim=True))[:, 0]
    if d > 1:
        assert_uniform((1 - share.abs()) ** (d - 1))
    assert abs((share > 0).float().mean() - 0.5) < 0.02


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_each_image_and_each_call_draws_its_own_start(norm):
    first, second = random_start(torch.empty(2, 3, 4, 4), 0.1, norm)
    assert not torch.equal(first, second)


def test_linf_direction_is_the_sign():
    grad = torch.tensor([-2.0, 0.0, 1e-30]).view(1, 3, 1, 1)
    assert ascent_direction(grad, "linf").flatten().tolist() == [-1, 0, 1]


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1.0, 1e30])
def test_l2_direction_is_the_unit_gradient_at_any_scale(scale):
    grad = torch.tensor([3.0, -4.0, 0.0]).view(1, 3, 1, 1) * scale
    found = ascent_direction(grad, "l2").flatten()
    # 1e-44 is a few units of the smallest number that fp32 holds: coarse, but of length one
    atol = 0.15 if scale == 1e-44 else 1e-5
    torch.testing.assert_close(found, torch.tensor([0.6, -0.8, 0.0]), rtol=0, atol=atol)
    assert abs(found.norm() - 1) < 1e-5


def test_l1_direction_is_of_the_largest_entries_that_can_move():
    grad = torch.arange(1.0, 201).view(2, 1, 10, 10) * torch.tensor([1, -1]).view(2, 1, 1, 1)
    found = ascent_direction(grad, "l1").flatten(1)
    assert found.nonzero().tolist() == [[0, 99], [1, 99]] and found[:, 99].tolist() == [1, -1]
    x = torch.full_like(grad, 0.5)
    x[0].flatten()[99] = 1
    x[1].flatten()[99] = 1  # from white the gradient leads back
    found = ascent_direction(grad, "l1", x).flatten(1)
    assert found.nonzero().tolist() == [[0, 98], [1, 99]]
    half = sparse_direction(grad, torch.tensor([0.04, 0.5])).flatten(1)
    assert (half != 0).sum(1).tolist() == [4, 50]
    torch.testing.assert_close(half.abs().sum(1), torch.ones(2))
    assert (half[1, :50] == 0).all()
    assert sparse_direction(0 * grad, torch.tensor([0.0, 1.0])).abs().max() == 0


def test_l2_direction_is_taken_per_image_and_zero_stays_zero():
    grad = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2), 9 * torch.ones(3, 2, 2)])
    lengths = ascent_direction(grad, "l2").flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([0.0, 1.0, 1.0]))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_projection_keeps_what_is_inside(norm):
    x = torch.rand(8, 3, 4, 4) * 0.5 + 0.25
    inside = x + 0.99 * random_start(x, 0.2, norm)
    torch.testing.assert_close(project(inside, x, 0.2, norm), inside, rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_projection_goes_to_the_nearest_point_of_the_ball(norm):
    x = torch.full((8, 3, 4, 4), 0.5)
    outside = (x + torch.randn_like(x)).double()
    projected = project(outside, x.double(), 0.2, norm)
    distance = (outside - projected).flatten(1).norm(dim=1)
    for _ in range(50):  # no point of the ball is nearer
        other = x + random_start(x, 0.2, norm)
        assert ((outside - other).flatten(1).norm(dim=1) > distance).all()
    # and it lies on the way: idempotent, and on the sphere
    torch.testing.assert_close(project(projected, x.double(), 0.2, norm), projected)
    radius = lengths(projected - x, norm)
    torch.testing.assert_close(radius, torch.full_like(radius, 0.2))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_projection_ends_in_the_box_and_still_in_the_ball(norm):
    x = torch.rand(64, 3, 4, 4).round()
    projected = project(x + torch.randn_like(x), x, 0.2, norm)
    assert 0 <= projected.min() <= projected.max() <= 1
    assert lengths(projected - x, norm).max() <= 0.2 + 1e-6


def searched(delta: Tensor, x: Tensor, eps: float) -> Tensor:
    """The projection to L1 ball and box by bisection, a number at a time: [d] in fp64."""
    room = torch.where(delta > 0, 1 - x, x)

    def shortened(amount: float) -> Tensor:
        return delta.sign() * (delta.abs() - amount).clamp_min(0).minimum(room)

    low, high = 0.0, delta.abs().max().item()
    if shortened(0).abs().sum() <= eps:
        return shortened(0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if shortened(middle).abs().sum() > eps else (low, middle)
    return shortened(high)


PIXEL = st.sampled_from([0.0, 0.25, 1.0]) | st.floats(0, 1)  # with ties, and at the border
MOVE = st.sampled_from([-2.0, -0.5, 0.0, 0.5]) | st.floats(-3, 3)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(PIXEL, MOVE), min_size=1, max_size=12), st.floats(0.01, 8))
def test_l1_projection_is_exact(entries: list[tuple[float, float]], eps: float) -> None:
    x, delta = torch.tensor(entries, dtype=torch.float64).T
    found = project((x + delta).view(1, 1, 1, -1), x.view(1, 1, 1, -1), eps, "l1").flatten()
    torch.testing.assert_close(found - x, searched(x + delta - x, x, eps), rtol=0, atol=1e-9)
    assert (found - x).abs().sum() <= eps * (1 + 1e-12) + 1e-12
    again = project(found.view(1, 1, 1, -1), x.view(1, 1, 1, -1), eps, "l1").flatten()
    torch.testing.assert_close(again, found, rtol=0, atol=1e-12)


def test_l1_projection_solves_the_quadratic_program():
    rng = np.random.default_rng(0)
    for d, eps in ((3, 0.5), (6, 1.0), (10, 2.5)):
        x, target = rng.uniform(size=d), rng.normal(size=d) * 1.5
        # delta = gain - loss, both at least 0
        solved = minimize(
            lambda z, d=d, target=target: ((z[:d] - z[d:] - target) ** 2).sum(),
            np.zeros(2 * d),
            bounds=[(0, 1 - v) for v in x] + [(0, v) for v in x],
            constraints={"type": "ineq", "fun": lambda z, eps=eps: eps - z.sum()},
            options={"ftol": 1e-14, "maxiter": 1000},
        ).x
        images = torch.from_numpy(x).view(1, 1, 1, d)
        found = project(images + torch.from_numpy(target).view(1, 1, 1, d), images, eps, "l1")
        delta = (found - images).flatten().numpy()
        np.testing.assert_allclose(delta, solved[:d] - solved[d:], atol=1e-5)


def test_l1_projection_is_the_authors_and_each_image_its_own():
    x = torch.rand(16, 3, 8, 8)
    x = torch.where(x < 0.2, 0.0, torch.where(x > 0.8, 1.0, x))
    delta = torch.randn_like(x)
    delta[0] /= 1000  # inside already
    found = project(x + delta, x, 5.0, "l1")
    theirs = delta + L1_projection(x, delta, 5.0)
    torch.testing.assert_close(found, x + theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(project((x + delta)[3:4], x[3:4], 5.0, "l1"), found[3:4])
