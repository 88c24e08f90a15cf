"""One-step attacks in the L-inf norm for fast adversarial training."""

from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor

from robust_accel.attacks.base import LossFn, input_gradient
from robust_accel.attacks.norms import project, random_start
from robust_accel.settings import Number, Settings


class FGSMRS(Settings):
    """FGSM from a random start, projected to the ball: "Fast AT".

    Args:
        eps: Radius of the L-inf ball in pixel units, in (0, 1].
        step_size: Length of the step in pixel units; 1.25 eps when not given.

    Source: Wong et al. 2020 (arXiv 2001.03994), the one-shot oracle of DAT-FGSM.
    """

    eps: Annotated[Number, Gt(0), Le(1)] = 8 / 255
    step_size: Annotated[Number, Gt(0)] | None = None

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        x = x.detach()
        step_size = 1.25 * self.eps if self.step_size is None else self.step_size
        start = (x + random_start(x, self.eps, "linf", generator)).clamp(0, 1)
        step = step_size * input_gradient(loss_fn, start).sign()
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

    eps: Annotated[Number, Gt(0), Le(1)] = 8 / 255
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
