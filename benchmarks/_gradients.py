"""Models of comm.py: gradients that are ready at once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

PART = 1 << 21  # elements of what FSDP2 gathers and exchanges together


class FixedGradients(nn.Module):
    """Parameters of given shapes, whose gradients are given: backward costs nothing."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros_like(p) for p in tensors)
        self.gradients = [1e-3 * torch.randn_like(p) for p in self.weights]

    def forward(self) -> Tensor:
        return _Fixed.apply(self.gradients, *self.weights)


class Parts(nn.ModuleList):
    """A model's parameters in several of them, as FSDP2 has its blocks."""

    def __init__(self, model: nn.Module) -> None:
        parts: list[list[Tensor]] = [[]]
        for tensor in model.parameters():
            if sum(t.numel() for t in parts[-1]) > PART:
                parts.append([])
            parts[-1].append(tensor)
        super().__init__(map(FixedGradients, parts))

    def forward(self) -> Tensor:
        return torch.stack([part() for part in self]).sum()


class _Fixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.gradients)
