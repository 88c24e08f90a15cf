"""DDN: an L2 attack that looks for the shortest perturbation by steering its length."""

import math
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from robust_accel.attacks.base import LossFn, verdict_and_input_gradient
from robust_accel.attacks.norms import ascent_direction, project
from robust_accel.settings import Number, OptionalPixels, Pixels, Settings, Whole, default


class DDN(Settings):
    """Decoupled direction and norm, held within an L2 ball.

    Each step follows the gradient's direction, and makes the perturbation shorter where the image
    is predicted wrongly and longer where it is not: it asks for a ``JudgedLoss``.

    Differs from the paper's algorithm, which knows no ball, in that the length never exceeds eps,
    and in that pixels are not quantised to 256 levels.

    Args:
        eps: Largest L2 norm in pixel units, > 0.
        num_steps: Number of steps, >= 1.
        gamma: Change of the norm a step, relative, in (0, 1).
        init_norm: Norm to begin with, in pixel units, at most eps; eps when not given, as Salman et
            al. train with (1 in the paper).

    Returns the shortest perturbation that was found to break the image (none for one that is wrong
    already), else the last, where the paper's returns none.

    Source: Rony et al. 2019 (arXiv 1811.09600), Algorithm 1; in training Salman et al. 2019.
    """

    may_stay: ClassVar[bool] = True  # the shortest perturbation of a wrong image is none

    eps: Pixels
    num_steps: Annotated[Whole, Ge(1)] = 10
    gamma: Annotated[Number, Gt(0), Lt(1)] = 0.05
    init_norm: OptionalPixels = default(None)

    @property
    def norm(self) -> str:
        return "l2"

    @property
    def fault(self) -> str | None:
        """Why no perturbation becomes as long as eps; None where it can."""
        way = self._first_norm * (1 + self.gamma) ** self.num_steps
        if way >= self.eps * (1 - 1e-6):
            return None
        return (
            f"init_norm: from {self._first_norm:.4g}, {self.num_steps} steps of gamma "
            f"{self.gamma:.4g} get no further than {way:.4g} of eps {self.eps:.4g}: leave it out "
            f"(null) for eps, or give at least {self.eps / (1 + self.gamma) ** self.num_steps:.4g}"
        )

    @property
    def _first_norm(self) -> float:
        return self.eps if self.init_norm is None else min(self.init_norm, self.eps)

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        x = x.detach()
        x_adv, best = x, x
        shape = (-1, 1, 1, 1)
        longest = torch.maximum(x, 1 - x).flatten(1).norm(dim=1).clamp(max=self.eps)  # [B]
        norm = longest.clamp(max=self._first_norm)
        shortest = torch.full_like(norm, torch.inf)
        for step in range(self.num_steps):
            wrong, grad = verdict_and_input_gradient(loss_fn, x_adv)
            length = (x_adv - x).flatten(1).norm(dim=1)
            better = wrong & (length < shortest)
            shortest = torch.where(better, length, shortest)
            best = torch.where(better.view(shape), x_adv, best)
            norm = torch.minimum(norm * torch.where(wrong, 1 - self.gamma, 1 + self.gamma), longest)
            # the authors' step size falls from 1 to 0.01 by half a cosine
            rate = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
            delta = x_adv - x + rate * _direction(grad, generator)
            unit = ascent_direction(delta, "l2")
            x_adv = project(x + norm.view(shape) * unit, x, self.eps, "l2")
        return torch.where(torch.isinf(shortest).view(shape), x_adv, best)


def _direction(grad: Tensor, generator: torch.Generator | None) -> Tensor:
    """The unit gradient, and a random one where an image has none: as the authors' code does."""
    noise = torch.empty_like(grad).normal_(generator=generator)
    none = (grad == 0).flatten(1).all(dim=1).view(-1, 1, 1, 1)
    return ascent_direction(torch.where(none, noise, grad), "l2")
