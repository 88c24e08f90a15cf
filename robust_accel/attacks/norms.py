"""The three operations in which the L-inf and the L2 ball differ: start, direction, projection."""

import math

import torch
from torch import Tensor

from robust_accel.settings import Norm


def random_start(
    x: Tensor, eps: float, norm: Norm, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a perturbation uniformly from the ball of radius eps: [B, C, H, W]."""
    if norm == "linf":
        return torch.empty_like(x).uniform_(-eps, eps, generator=generator)
    direction = _unit_l2(torch.empty_like(x).normal_(generator=generator))
    # uniform in the ball: the radius grows as U^(1/d), d the dimension of one image
    radius = torch.empty_like(x[:, :1, :1, :1]).uniform_(generator=generator)
    return direction * eps * radius ** (1 / math.prod(x.shape[1:]))


def ascent_direction(grad: Tensor, norm: Norm) -> Tensor:
    """Steepest ascent of length one in the norm, [B, C, H, W]: sign (L-inf), unit gradient (L2)."""
    return grad.sign() if norm == "linf" else _unit_l2(grad)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: Norm) -> Tensor:
    """Nearest point to x_adv in the ball around x, then in [0, 1].

    x lies in [0, 1], so clipping moves each pixel towards x and does not leave the ball.
    """
    if norm == "linf":
        x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps)
    else:
        delta = x_adv - x
        x_adv = x + delta * (eps / _l2(delta).clamp_min(eps))
    return x_adv.clamp(0, 1)


def _l2(v: Tensor) -> Tensor:
    return v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)  # [B, 1, 1, 1]


def _unit_l2(v: Tensor) -> Tensor:
    # dividing by the largest entry first keeps tiny gradients from underflowing in the square
    v = v / v.flatten(1).abs().amax(dim=1).clamp_min(torch.finfo(v.dtype).tiny).view(-1, 1, 1, 1)
    return v / _l2(v).clamp_min(torch.finfo(v.dtype).tiny)
