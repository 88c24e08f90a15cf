"""DDN: an L2 attack that looks for the shortest perturbation by steering its length."""

import math
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from robust_accel.attacks.base import LossFn, loss_and_input_gradient
from robust_accel.attacks.norms import ascent_direction, project
from robust_accel.settings import Number, Settings


class DDN(Settings):
    """Decoupled direction and norm, held within an L2 ball.

    Each step follows the gradient's direction, and makes the perturbation shorter where the image
    is broken and longer where it is not. Broken means that the true class has less than half of
    the probability: the smoothed classifier would not be certified. (The paper asks whether another
    class is predicted; an attack here knows the loss alone.)

    Args:
        eps: Largest L2 norm in pixel units, > 0.
        num_steps: >= 1.
        gamma: Change of the norm a step, relative, in (0, 1).
        init_norm: Norm to begin with, in pixel units; eps if that is smaller.

    Returns the shortest perturbation that broke the image, else the last.

    Source: Rony et al. 2019 (arXiv 1811.09600), Algorithm 1; in training Salman et al. 2019.
    """

    may_stay: ClassVar[bool] = True  # the shortest perturbation of a wrong image is none

    eps: Annotated[Number, Gt(0)]
    num_steps: Annotated[int, Ge(1)] = 10
    gamma: Annotated[Number, Gt(0), Lt(1)] = 0.05
    init_norm: Annotated[Number, Gt(0)] = 1.0

    @property
    def norm(self) -> str:
        return "l2"

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        x = x.detach()
        x_adv, best = x, x
        shape = (-1, 1, 1, 1)
        norm = torch.full((len(x),), min(self.init_norm, self.eps), device=x.device, dtype=x.dtype)
        shortest = torch.full_like(norm, torch.inf)
        for step in range(self.num_steps):
            loss, grad = loss_and_input_gradient(loss_fn, x_adv)
            broken = loss > math.log(2)
            length = (x_adv - x).flatten(1).norm(dim=1)
            better = broken & (length < shortest)
            shortest = torch.where(better, length, shortest)
            best = torch.where(better.view(shape), x_adv, best)
            norm = norm * torch.where(broken, 1 - self.gamma, 1 + self.gamma)
            # the authors' step size falls from 1 to 0.01 by half a cosine
            rate = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
            delta = x_adv - x + rate * ascent_direction(grad, "l2")
            unit = ascent_direction(delta, "l2")
            x_adv = project(x + norm.view(shape) * unit, x, self.eps, "l2")
        return torch.where(torch.isinf(shortest).view(shape), x_adv, best)
