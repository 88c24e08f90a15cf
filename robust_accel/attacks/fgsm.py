"""One-step attacks in the L-inf norm for fast adversarial training."""

from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor

from robust_accel.attacks.base import LossFn, input_gradient
from robust_accel.attacks.norms import project, random_start
from robust_accel.attacks.steps import unfit_step
from robust_accel.settings import Number, OptionalPixels, Pixels, Settings, default


class FGSMRS(Settings):
    """FGSM from a random start, projected to the ball: "Fast AT".

    Args:
        eps: Radius of the L-inf ball in pixel units, in (0, 1].
        step_size: Length of the step in pixel units; 1.25 eps when not given. One shorter than eps
            reaches the ball's edge from some starts only: a warning; a recipe refuses one longer
            than 2 eps.

    Source: Wong et al. 2020 (arXiv 2001.03994), the one-shot oracle of DAT-FGSM.
    """

    eps: Annotated[Pixels, Le(1)] = default(8 / 255)
    step_size: OptionalPixels = default(None)

    @property
    def step_length(self) -> float:
        """``step_size``, or what the rule gives."""
        return self._rule if self.step_size is None else self.step_size

    @property
    def fault(self) -> str | None:
        """Why the step is none for this ball; None where it is one."""
        return self._unfit if self.step_length > self.eps else None

    @property
    def doubt(self) -> str | None:
        """Why the step may be too short: some starts are nearer to the edge, others not."""
        return self._unfit if self.step_length <= self.eps else None

    @property
    def _unfit(self) -> str | None:
        found = unfit_step(1, self.step_length, self.eps, self._rule)
        return None if found is None else f"step_size: {found}"

    @property
    def _rule(self) -> float:
        return 1.25 * self.eps

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        x = x.detach()
        start = (x + random_start(x, self.eps, "linf", generator)).clamp(0, 1)
        step = self.step_length * input_gradient(loss_fn, start).sign()
        return project(start + step, x, self.eps, "linf")


class NFGSM(Settings):
    """N-FGSM: strong uniform noise, one step, and no projection.

    The result leaves the eps-ball by design, up to (1 + noise_scale) eps: it trains against
    catastrophic overfitting and is no attack to evaluate with.

    Args:
        eps: Length of the step in pixel units, in (0, 1].
        noise_scale: The noise is uniform in [-noise_scale * eps, noise_scale * eps].

    Source: de Jorge et al. 2022 (arXiv 2202.01181).
    """

    eps: Annotated[Pixels, Le(1)] = default(8 / 255)
    noise_scale: Annotated[Number, Gt(0)] = 2.0

    @property
    def reach(self) -> float:
        """How far a pixel may be moved."""
        return (1 + self.noise_scale) * self.eps

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        x = x.detach()
        noisy = (x + random_start(x, self.noise_scale * self.eps, "linf", generator)).clamp(0, 1)
        return (noisy + self.eps * input_gradient(loss_fn, noisy).sign()).clamp(0, 1)
