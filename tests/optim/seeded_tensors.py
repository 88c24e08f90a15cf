"""Small parameters and gradients from seeds, steps with them, and their comparison."""

import torch
from torch import Tensor, nn

SHAPES = [(4, 3), (5,), (2, 3, 2, 2), ()]


def tensors(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES
    ]


def run(optimizer: torch.optim.Optimizer, *, num_steps: int, first_seed: int = 100) -> None:
    """Steps with gradients that do not depend on the parameters, so that no rounding grows."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(num_steps):
        for param, grad in zip(params, tensors(seed=first_seed + step), strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()


def make_params(**kwargs) -> list[nn.Parameter]:
    return [nn.Parameter(tensor) for tensor in tensors(**kwargs)]


def assert_equal(actual, expected, **tolerance) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), torch.as_tensor(b).detach(), **tolerance)
