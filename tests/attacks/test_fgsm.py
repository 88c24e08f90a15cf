"""The one-step attacks: FGSM from a random start, and N-FGSM."""

import pytest
import torch
from torch import Tensor

from robust_accel.attacks import FGSMRS, NFGSM

EPS = 8 / 255
X = torch.full((4, 3, 5, 5), 0.5)
W = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def linear(x: Tensor) -> Tensor:
    return (W * x).sum((1, 2, 3))


def test_fgsm_rs_reaches_the_optimum_with_a_step_across_the_ball():
    found = FGSMRS(eps=EPS, step_size=2 * EPS)(linear, X)
    torch.testing.assert_close(found, X + EPS * W.sign())


def test_fgsm_rs_steps_by_five_quarters_of_eps_unless_told_otherwise():
    # the start is uniform in +-eps, so 1.25 eps reaches the border iff start >= -eps / 4: 5 in 8
    x = torch.full((64, 3, 20, 20), 0.5)
    at_border = (FGSMRS(eps=EPS)(lambda x: x.sum((1, 2, 3)), x) - x) > EPS * 0.9999
    assert abs(at_border.float().mean() - 5 / 8) < 0.01
    lowest = (FGSMRS(eps=EPS)(lambda x: x.sum((1, 2, 3)), x) - x).min()
    assert lowest == pytest.approx(EPS / 4, rel=0.01)


@pytest.mark.parametrize("attack", [FGSMRS(eps=EPS), NFGSM(eps=EPS)], ids=["fgsm-rs", "n-fgsm"])
def test_one_gradient_at_a_noisy_image_in_the_box(attack):
    seen = []

    def loss_fn(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return linear(x)

    x = torch.rand_like(X).round()
    attack(loss_fn, x)
    assert len(seen) == 1
    assert 0 <= seen[0].min() <= seen[0].max() <= 1
    radius = EPS if isinstance(attack, FGSMRS) else 2 * EPS
    assert 0.95 * radius < (seen[0] - x).abs().max() <= radius + 1e-6


def test_n_fgsm_is_noise_and_a_step_of_eps_without_projection():
    seen = []

    def loss_fn(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return linear(x)

    found = NFGSM(eps=EPS)(loss_fn, X)
    torch.testing.assert_close(found, seen[0] + EPS * W.sign())
    longest = (found - X).abs().max()
    assert 2.8 * EPS < longest <= 3 * EPS + 1e-6  # (1 + noise_scale) eps: out of the ball


def test_n_fgsm_noise_is_uniform_and_scales():
    x = torch.full((64, 3, 20, 20), 0.5)
    for scale in (0.5, 2.0):
        attack = NFGSM(eps=EPS, noise_scale=scale)
        noise = attack(lambda x: x.sum((1, 2, 3)), x) - x - EPS
        assert noise.abs().max() == pytest.approx(scale * EPS, rel=0.001)
        assert noise.var() == pytest.approx((2 * scale * EPS) ** 2 / 12, rel=0.02)


def test_n_fgsm_stays_in_the_box():
    x = torch.rand_like(X).round()
    found = NFGSM(eps=EPS)(linear, x)
    assert 0 <= found.min() <= found.max() <= 1
