"""The three operations in which balls of different norms differ: start, direction, projection."""

import math

import torch
from torch import Tensor

from robust_accel.settings import Norm

_ENTRIES = 0.01  # of a gradient that a step in L1 follows
ORDERS: dict[str, float] = {"linf": math.inf, "l2": 2, "l1": 1}


def lengths(delta: Tensor, norm: str) -> Tensor:
    """Of each perturbation, [B, C, H, W] -> [B], in a norm that ``ORDERS`` has."""
    return delta.flatten(1).norm(dim=1, p=ORDERS[norm])


def is_beyond(length: float, eps: float) -> bool:
    """Whether a perturbation of that length has left a ball, and not by rounding alone."""
    return length > eps * 1.001 + 1e-6


def random_start(
    x: Tensor, eps: float, norm: Norm, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a perturbation uniformly from the ball of radius eps: [B, C, H, W]."""
    if norm == "linf":
        return torch.empty_like(x).uniform_(-eps, eps, generator=generator)
    if norm == "l2":
        direction = _unit(torch.empty_like(x).normal_(generator=generator), norm)
    else:
        one, other = (torch.empty_like(x).exponential_(generator=generator) for _ in range(2))
        direction = _unit(one - other, norm)
    # uniform in the ball: the radius grows as U^(1/d), d the dimension of one image
    radius = torch.empty_like(x[:, :1, :1, :1]).uniform_(generator=generator)
    return direction * eps * radius ** (1 / math.prod(x.shape[1:]))


def ascent_direction(grad: Tensor, norm: Norm, at: Tensor | None = None) -> Tensor:
    """Ascent of length one in the norm, [B, C, H, W].

    The steepest in L-inf (sign) and L2 (unit gradient). In L1 that were one pixel value; here it is
    the largest hundredth of the gradient, all of them equally (Tramer and Boneh 2019, arXiv
    1904.13000, SLIDE with q = 99%).

    Args:
        at: Of L1: the images there, in [0, 1]. Values at the border of the box that the gradient
            leads out of it take no part, for their share of the step would be lost.
    """
    if norm == "linf":
        return grad.sign()
    if norm == "l2":
        return _unit(grad, norm)
    if at is not None:
        grad = torch.where(torch.where(grad > 0, at < 1, at > 0), grad, 0)
    return sparse_direction(grad, torch.full_like(grad[:, 0, 0, 0], _ENTRIES))


def sparse_direction(grad: Tensor, share: Tensor) -> Tensor:
    """Signs of the largest entries of each image, together of length one in L1: [B, C, H, W].

    Args:
        share: Of an image's entries, in [0, 1]: [B]. One at least is taken.
    """
    size = grad.flatten(1).abs()
    number = size.shape[1]
    least = ((1 - share) * number).long().clamp(0, number - 1)
    least = size.sort(dim=1).values.gather(1, least[:, None]).view(-1, 1, 1, 1)
    signs = torch.where(grad.abs() >= least, grad, 0).sign()
    return signs / lengths(signs, "l1").clamp_min(1).view(-1, 1, 1, 1)


def project(x_adv: Tensor, x: Tensor, eps: float, norm: Norm) -> Tensor:
    """Nearest point to x_adv in the ball around x, then in [0, 1]; L1: in both at once.

    x lies in [0, 1], so clipping moves each pixel towards x and does not leave the ball.
    """
    if norm == "linf":
        x_adv = torch.minimum(torch.maximum(x_adv, x - eps), x + eps)
    elif norm == "l2":
        delta = x_adv - x
        x_adv = x + delta * (eps / _of_images(lengths(delta, norm)).clamp_min(eps))
    else:
        x_adv = x + _nearest_in_l1(x_adv - x, x, eps)
    return x_adv.clamp(0, 1)


def _nearest_in_l1(delta: Tensor, x: Tensor, eps: float) -> Tensor:
    """Nearest perturbation to delta in the L1 ball by which x stays in the box.

    Each entry is shortened by one amount, at most to zero, and then to what the box has room for;
    the amount is the least by which all are no longer than eps. As it falls from the longest entry
    on, the sum grows as a broken line, whose corners are sorted here: an entry comes in where the
    amount is its length, and grows no more where that is longer by the amount than its room.

    Source: Croce and Hein 2021 (arXiv 2103.01208), whose projection this is.
    """
    length = delta.flatten(1).abs().double()
    room = torch.where(delta > 0, 1 - x, x).flatten(1).double()
    corners = torch.cat([length, length - room], dim=1).clamp_min(0)
    corners, index = corners.sort(dim=1, descending=True)
    growing = torch.where(index < length.shape[1], 1.0, -1.0).double().cumsum(dim=1)[:, :-1]
    sums = (growing * (corners[:, :-1] - corners[:, 1:])).cumsum(dim=1)  # at corners[:, 1:]
    first = (sums < eps).sum(dim=1, keepdim=True)  # of the corners behind eps
    is_longer = first < sums.shape[1]
    first = first.clamp_max(sums.shape[1] - 1)
    beyond = (sums.gather(1, first) - eps) / growing.gather(1, first).clamp_min(1)
    amount = torch.where(is_longer, corners.gather(1, first + 1) + beyond, 0)
    kept = (length - amount).clamp_min(0).minimum(room)
    return kept.view_as(delta).to(delta.dtype) * delta.sign()


def _of_images(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _unit(v: Tensor, norm: str) -> Tensor:
    # dividing by the largest entry first keeps tiny gradients from underflowing in the square
    tiny = torch.finfo(v.dtype).tiny
    v = v / _of_images(lengths(v, "linf")).clamp_min(tiny)
    return v / _of_images(lengths(v, norm)).clamp_min(tiny)
