"""The protocol that every attack follows, and the one place that differentiates in the input."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

LossFn = Callable[[Tensor], Tensor]
"""x: [B, C, H, W] in [0, 1] -> losses [B], the function that an attack climbs."""


class Attack(Protocol):
    """Maps images to adversarial images; knows neither the model nor the labels.

    What it promises is checked on the first batch of a training: with an attribute ``eps`` (and
    ``norm``, L-inf if it has none), no image is moved further, or than ``reach`` if it has that,
    and some are moved, unless ``may_stay`` is true. ``doubt`` may be a warning about its settings.
    """

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return x_adv: shape, dtype and device of x, in [0, 1], detached."""
        ...


_seen: ContextVar[list[Tensor] | None] = ContextVar("seen", default=None)


@contextmanager
def gradients_seen() -> Iterator[list[Tensor]]:
    """Collects, for each gradient that is taken in the block, whether it is anywhere not zero."""
    seen: list[Tensor] = []
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


def input_gradient(loss_fn: LossFn, x: Tensor) -> Tensor:
    """Gradient of the summed loss in x, [B, C, H, W]; no parameter gradient is touched."""
    return loss_and_input_gradient(loss_fn, x)[1]


def loss_and_input_gradient(loss_fn: LossFn, x: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [B], detached, and the gradient of their sum in x.

    Summed, not averaged: a mean's gradient underflows to sign(0) in fp16.

    Raises:
        RuntimeError: Under ``torch.inference_mode``.
        ValueError: ``loss_fn`` does not return one number an image.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "an attack needs gradients, which torch.inference_mode() rules out: use "
            "torch.no_grad() around it instead"
        )
    with torch.enable_grad():
        x = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
        loss = loss_fn(x).float()
        if loss.shape != x.shape[:1]:
            raise ValueError(
                f"loss_fn must return one loss an image, [{len(x)}], got {list(loss.shape)}: an "
                "attack climbs x -> cross_entropy(model(x), labels, reduction='none'), not a model"
            )
        (grad,) = torch.autograd.grad(loss.sum(), x)
    seen = _seen.get()
    if seen is not None:
        seen.append(grad.any())
    return loss.detach(), grad
