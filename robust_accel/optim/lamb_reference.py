"""LAMB as the paper prints it: one step of one tensor. ``lamb.py`` is tested against this."""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """m, v of the tensor's shape, and t, the steps taken so far."""

    m: Tensor
    v: Tensor
    t: int = 0

    @classmethod
    def zeros_like(cls, theta: Tensor) -> "Moments":
        return cls(torch.zeros_like(theta), torch.zeros_like(theta))


def lamb_step(
    theta: Tensor,
    grad: Tensor,
    moments: Moments,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    zeta: float = 1e-6,
    weight_decay: float = 0.0,
    c_l: float = 0.0,
    c_u: float = 10.0,
) -> tuple[Tensor, Moments]:
    """The tensor after one step, and its moments: Algorithm A2 and equation (3) of DAT.

    ``weight_decay`` is You et al.'s (Algorithm A2 has none), and so is a ratio of 1 where it would
    be 0 or divide by 0.
    """
    t = moments.t + 1
    m = beta1 * moments.m + (1 - beta1) * grad
    v = beta2 * moments.v + (1 - beta2) * grad**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    u = m_hat / (v_hat.sqrt() + zeta) + weight_decay * theta
    tau = min(max(theta.norm().item(), c_l), c_u)
    norm_u = u.norm().item()
    ratio = tau / norm_u if tau > 0 and norm_u > 0 else 1.0
    return theta - lr * ratio * u, Moments(m, v, t)  # (A30)
