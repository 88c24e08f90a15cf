"""Attacks by a shift, by each way of writing a class."""

import logging
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel
from torch import Tensor

from robust_accel.settings import Number, Settings


class Brightness(Settings):
    """Everything brighter by eps: a shift that no gradient is needed for."""

    eps: Number = 0.1
    shift: Number = 1.0

    def __call__(self, loss_fn, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return (x + self.shift * self.eps).clamp(0, 1)


class Shift:
    def by(self, x: Tensor, eps: float) -> Tensor:
        return x + eps


class Plain:
    eps = 0.1
    logger = logging.getLogger(__name__)

    def __init__(self) -> None:
        self.shift = Shift()

    def __call__(self, loss_fn, x: Tensor, *, generator=None) -> Tensor:
        self.logger.debug("%s", Shift)
        return self.shift.by(x, self.eps).clamp(0, 1)


class OfPydantic(BaseModel):
    eps: float = 0.1

    def __call__(self, loss_fn, x: Tensor, *, generator=None) -> Tensor:
        return Shift().by(x, self.eps).clamp(0, 1)


@dataclass(slots=True, order=True)
class Data:
    eps: float = 0.1
    held: list[float] = field(default_factory=list)

    def __call__(self, loss_fn, x: Tensor, *, generator=None) -> Tensor:
        return Shift().by(x, self.eps).clamp(0, 1)


KINDS: dict[str, type] = {kind.__name__: kind for kind in (Brightness, Plain, OfPydantic, Data)}
