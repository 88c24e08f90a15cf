"""Projected gradient descent on the input, and the attack that leaves images as they are."""

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from pydantic import ValidationInfo, field_validator
from torch import Tensor

from robust_accel.attacks.base import LossFn, input_gradient
from robust_accel.attacks.norms import ascent_direction, project, random_start
from robust_accel.attacks.steps import default_step, unfit_step
from robust_accel.settings import Flag, Norm, OptionalPixels, Pixels, Settings, Whole, default

_GAUSSIAN_START = 0.001  # Zhang et al. 2019 (arXiv 1901.08573), Algorithm 1


class NoAttack(Settings):
    """No perturbation: adversarial training becomes standard training."""

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        return x.detach()


class Ball(Settings):
    """What searches the ball of radius ``eps`` in ``norm``, in pixel units."""

    norm: Norm = "linf"
    eps: Pixels = default(8 / 255)

    @field_validator("eps")
    @classmethod
    def _in_pixel_units(cls, eps: float, info: ValidationInfo) -> float:
        if info.data.get("norm") == "linf" and eps > 1:
            raise ValueError("in pixel units an L-inf eps is at most 1, like 8/255")
        return eps


class PGD(Ball):
    """Iterated steepest ascent, projected to the ball; returns the last iterate.

    Args:
        norm: ``linf``, ``l2`` or ``l1``; in L1 a step goes along the largest hundredth of the
            gradient, and ``apgd`` finds more.
        eps: Radius of the ball in pixel units, > 0 (``8/255`` is accepted); L-inf: at most 1.
        num_steps: Number of steps, >= 1.
        step_size: Length of a step in pixel units, > 0; 2.5 eps / num_steps, at most eps, when not
            given (Madry et al.'s rule; 2/255 for 10 steps in 8/255). A recipe refuses steps that
            cannot reach the ball's edge, and steps longer than 2 eps, which end where one of 2 eps
            does.
        random_start: Start uniformly in the ball (true), at x (false), or near x with the noise
            of TRADES (``gaussian``: standard deviation 0.001).

    Source: Madry et al. 2018 (arXiv 1706.06083); (A1) of DAT. In L1 SLIDE of Tramer and Boneh 2019
    (arXiv 1904.13000), projected to ball and box at once.
    """

    num_steps: Annotated[Whole, Ge(1)] = 10
    step_size: OptionalPixels = default(None)
    random_start: Flag | Literal["gaussian"] = True

    @property
    def step_length(self) -> float:
        """``step_size``, or what the rule gives."""
        return self._rule if self.step_size is None else self.step_size

    @property
    def fault(self) -> str | None:
        """Why these steps do not search the ball; None where they do."""
        found = unfit_step(self.num_steps, self.step_length, self.eps, self._rule)
        return None if found is None else f"step_size: {found}"

    @property
    def _rule(self) -> float:
        return default_step(self.num_steps, self.eps)

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        x = x.detach()
        x_adv = x
        if self.random_start == "gaussian":
            x_adv = x + torch.empty_like(x).normal_(std=_GAUSSIAN_START, generator=generator)
        elif self.random_start:
            x_adv = (x + random_start(x, self.eps, self.norm, generator)).clamp(0, 1)
        step_length = self.step_length
        for _ in range(self.num_steps):
            grad = input_gradient(loss_fn, x_adv)
            step = step_length * ascent_direction(grad, self.norm, x_adv)
            x_adv = project(x_adv + step, x, self.eps, self.norm)
        # last iterate: choosing the best one would cost a forward, and training wants no choice
        return x_adv
