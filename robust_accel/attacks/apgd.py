"""Auto-PGD: an attack that chooses its own step lengths and goes back to the best point."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from robust_accel.attacks.base import LossFn, judged_and_input_gradient
from robust_accel.attacks.norms import ascent_direction, project, random_start
from robust_accel.attacks.pgd import Ball
from robust_accel.settings import Whole

_MOMENTUM = 0.75
_ENOUGH = 0.75  # share of the steps since the last checkpoint that must have gained


class APGD(Ball):
    """Projected ascent with momentum, whose step is halved where it no longer gains.

    It returns the best point that it met: the one of the largest loss, of those that are predicted
    wrongly where there are any and ``loss_fn`` is a ``JudgedLoss``.

    Args:
        norm: ``linf`` or ``l2``.
        eps: Radius of the ball in pixel units, > 0 (``8/255`` is accepted); L-inf: at most 1.
        num_steps: Number of steps, >= 1; one gradient more looks at where the last one led.

    Source: Croce and Hein 2020 (arXiv 2003.01690), Algorithm 1, in L2 and L-inf. Theirs leaves an
    image at its first success; here all images of a batch take all steps.
    """

    num_steps: Annotated[Whole, Ge(1)] = 20

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        x = x.detach()
        now = (x + random_start(x, self.eps, self.norm, generator)).clamp(0, 1)
        before, checkpoints, since = now, _checkpoints(self.num_steps), 0
        loss, wrong, grad = judged_and_input_gradient(loss_fn, now)
        best, best_grad, best_loss, best_wrong = now, grad, loss, wrong
        best_before, halved, gains = loss, torch.ones_like(wrong), torch.zeros_like(loss)
        step = torch.full_like(x[:, :1, :1, :1], 2 * self.eps)
        for i in range(self.num_steps):
            if i in checkpoints:
                stays = ~halved & (best_loss <= best_before)  # at this length nothing was found
                halved = (gains < _ENOUGH * (i - since)) | stays
                step = _where(halved, step / 2, step)
                now, grad = _where(halved, best, now), _where(halved, best_grad, grad)
                loss = torch.where(halved, best_loss, loss)
                gains, best_before, since = torch.zeros_like(gains), best_loss, i
            ahead = now + step * ascent_direction(grad, self.norm)
            ahead = project(ahead, x, self.eps, self.norm)
            if i:
                ahead = now + _MOMENTUM * (ahead - now) + (1 - _MOMENTUM) * (now - before)
                ahead = project(ahead, x, self.eps, self.norm)
            before, now, last_loss = now, ahead, loss
            loss, wrong, grad = judged_and_input_gradient(loss_fn, now)
            gains += loss > last_loss
            better = (wrong & ~best_wrong) | ((wrong == best_wrong) & (loss > best_loss))
            best, best_grad = _where(better, now, best), _where(better, grad, best_grad)
            best_loss, best_wrong = torch.where(better, loss, best_loss), best_wrong | wrong
        return best


def _where(images: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """For each image [B] one of two tensors [B, ...]."""
    return torch.where(images.view(-1, 1, 1, 1), a, b)


def _checkpoints(num_steps: int) -> set[int]:
    """Steps before which lengths are looked at: ever closer, from 22% of the way on."""
    found, percent, gap = set(), 22, 19
    while percent < 100:
        found.add(-(-percent * num_steps // 100))
        percent, gap = percent + gap, max(gap - 3, 6)
    return found
