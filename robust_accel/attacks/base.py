"""The protocol that every attack follows, and the one place that differentiates in the input."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

LossFn = Callable[[Tensor], Tensor]
"""x: [B, C, H, W] in [0, 1] -> losses [B], the function that an attack climbs."""


class Attack(Protocol):
    """Maps images to adversarial images; knows neither the model nor the labels."""

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return x_adv: shape, dtype and device of x, in [0, 1], detached."""
        ...


def input_gradient(loss_fn: LossFn, x: Tensor) -> Tensor:
    """Gradient of the summed loss in x, [B, C, H, W]; no parameter gradient is touched."""
    return loss_and_input_gradient(loss_fn, x)[1]


def loss_and_input_gradient(loss_fn: LossFn, x: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [B], detached, and the gradient of their sum in x.

    Summed, not averaged: a mean's gradient underflows to sign(0) in fp16.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = loss_fn(x).float()
        (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad
