"""Start, direction and projection of the two balls."""

import pytest
import torch
from torch import Tensor

from robust_accel.attacks.norms import ascent_direction, project, random_start

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


@pytest.mark.parametrize("norm", ["linf", "l2"])
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


def test_l2_direction_is_taken_per_image_and_zero_stays_zero():
    grad = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2), 9 * torch.ones(3, 2, 2)])
    lengths = ascent_direction(grad, "l2").flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([0.0, 1.0, 1.0]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_keeps_what_is_inside(norm):
    x = torch.rand(8, 3, 4, 4) * 0.5 + 0.25
    inside = x + 0.99 * random_start(x, 0.2, norm)
    torch.testing.assert_close(project(inside, x, 0.2, norm), inside, rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
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
    order = 2 if norm == "l2" else float("inf")
    radius = (projected - x).flatten(1).norm(order, dim=1)
    torch.testing.assert_close(radius, torch.full_like(radius, 0.2))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_ends_in_the_box_and_still_in_the_ball(norm):
    x = torch.rand(64, 3, 4, 4).round()
    projected = project(x + torch.randn_like(x), x, 0.2, norm)
    assert 0 <= projected.min() <= projected.max() <= 1
    order = 2 if norm == "l2" else float("inf")
    assert (projected - x).flatten(1).norm(order, dim=1).max() <= 0.2 + 1e-6
