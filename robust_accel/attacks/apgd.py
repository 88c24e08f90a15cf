"""Auto-PGD: an attack that chooses its own step lengths and goes back to the best point."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from robust_accel.attacks.base import LossFn, judged_and_input_gradient
from robust_accel.attacks.norms import ascent_direction, project, random_start, sparse_direction
from robust_accel.attacks.pgd import Ball
from robust_accel.settings import Whole

_ENOUGH = 0.75  # share of the steps since the last checkpoint that must have gained


class APGD(Ball):
    """Projected ascent with momentum, whose step is halved where it no longer gains.

    In L1 there is no momentum: a step moves ever fewer pixel values, and is shorter where the best
    point so far does not become sparser.

    It returns the best point that it met: the one of the largest loss, of those that are predicted
    wrongly where there are any and ``loss_fn`` is a ``JudgedLoss``.

    Args:
        norm: ``linf``, ``l2`` or ``l1``.
        eps: Radius of the ball in pixel units, > 0 (``8/255`` is accepted); L-inf: at most 1.
        num_steps: Number of steps, >= 1; one gradient more looks at where the last one led.

    Source: Croce and Hein 2020 (arXiv 2003.01690), Algorithm 1; in L1 Croce and Hein 2021 (arXiv
    2103.01208). Theirs returns the last wrong point and goes back to that of the highest loss;
    here both are the wrong one of the highest loss. Theirs starts at noise that is as long as eps,
    in L1 at noise that is projected to the ball; here uniformly in it. Once an image has gone
    back, its next step gains here if it beats the best loss, there if it beats the point it left.
    """

    num_steps: Annotated[Whole, Ge(1)] = 20

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        x = x.detach()
        now = (x + random_start(x, self.eps, self.norm, generator)).clamp(0, 1)
        pace = _Sparser(self, x) if self.norm == "l1" else _Halved(self, x)
        before, momentum = now, pace.momentum
        loss, wrong, grad = judged_and_input_gradient(loss_fn, now)
        best, best_grad, best_loss, best_wrong = now, grad, loss, wrong
        for i in range(self.num_steps):
            if i in pace.checkpoints:
                back = pace.look(i, best - x, best_loss)
                now, grad = _where(back, best, now), _where(back, best_grad, grad)
                loss = torch.where(back, best_loss, loss)
            ahead = project(now + pace.step(grad), x, self.eps, self.norm)
            if i and momentum:
                ahead = now + (1 - momentum) * (ahead - now) + momentum * (now - before)
                ahead = project(ahead, x, self.eps, self.norm)
            before, now, last_loss = now, ahead, loss
            loss, wrong, grad = judged_and_input_gradient(loss_fn, now)
            pace.gains += loss > last_loss
            better = (wrong & ~best_wrong) | ((wrong == best_wrong) & (loss > best_loss))
            best, best_grad = _where(better, now, best), _where(better, grad, best_grad)
            best_loss, best_wrong = torch.where(better, loss, best_loss), best_wrong | wrong
        return best


class _Halved:
    """Steps in L-inf and L2: halved, from the best point on, where too few have gained.

    Attributes:
        gains: Of each image, the steps since the last checkpoint that have gained: [B].
    """

    momentum = 0.25

    def __init__(self, attack: APGD, x: Tensor) -> None:
        self.norm = attack.norm
        self.checkpoints = _checkpoints(attack.num_steps)
        self.length = torch.full_like(x[:, :1, :1, :1], 2 * attack.eps)
        self.gains, self.best_before = (torch.zeros_like(x[:, 0, 0, 0]) for _ in range(2))
        self.halved = torch.ones_like(self.gains, dtype=torch.bool)
        self.since = 0

    def look(self, i: int, best: Tensor, best_loss: Tensor) -> Tensor:
        """Before step i: which images go back to their best perturbations [B, C, H, W]."""
        stays = ~self.halved & (best_loss <= self.best_before)  # at this length nothing was found
        self.halved = (self.gains < _ENOUGH * (i - self.since)) | stays
        self.length = _where(self.halved, self.length / 2, self.length)
        self.gains, self.best_before, self.since = torch.zeros_like(self.gains), best_loss, i
        return self.halved

    def step(self, grad: Tensor) -> Tensor:
        return self.length * ascent_direction(grad, self.norm)


class _Sparser:
    """Steps in L1: of 1.5 times fewer pixel values than the best point so far has moved.

    Where that has become sparser, by a twentieth, the next step is as long as eps and starts there;
    else steps become shorter.
    """

    momentum = 0.0

    def __init__(self, attack: APGD, x: Tensor) -> None:
        self.eps, self.gains = attack.eps, torch.zeros_like(x[:, 0, 0, 0])
        every = max(1, attack.num_steps // 25)
        self.checkpoints = set(range(every, attack.num_steps, every))
        self.length = torch.full_like(x[:, :1, :1, :1], attack.eps)
        self.share = torch.full_like(self.gains, 0.2)
        self.moved = torch.ones_like(self.gains)  # share of the pixel values

    def look(self, i: int, best: Tensor, best_loss: Tensor) -> Tensor:
        """As of ``_Halved``."""
        moved = (best != 0).flatten(1).to(self.moved.dtype).mean(dim=1)
        sparser = moved < 0.95 * self.moved
        shorter = (self.length / 1.5).clamp_min(self.eps / 10)
        self.length = _where(sparser, torch.full_like(shorter, self.eps), shorter)
        self.moved, self.share = moved, moved / 1.5
        return sparser

    def step(self, grad: Tensor) -> Tensor:
        return self.length * sparse_direction(grad, self.share)


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
