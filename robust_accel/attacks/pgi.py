"""FGSM from where an image's last attack has ended: it keeps a perturbation of each image."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor
from torch.nn.functional import mse_loss

from robust_accel.attacks.base import LossFn, input_gradient
from robust_accel.attacks.norms import project
from robust_accel.settings import Number, Pixels, Settings, Whole, default

_LEVELS = 127  # of a perturbation in eps, either way


class FGSMPGI(Settings):
    """FGSM with a prior-guided start, and a loss that holds the logits to those at the start.

    An image's attack is one step of eps from where its last one, an epoch ago, has led; the outer
    loss gets ``prior_weight`` times the mean squared distance between the logits there and at the
    start. ``momentum_decay: 0`` is the paper's FGSM-EP; above 0, FGSM-MEP, the next start follows
    the sign of the image's gradients, those of earlier epochs decayed.

    It must know which image is which, so it is for ``robust-accel train`` alone, on images in
    memory: on several processes with ``data.sharding: fixed``, and without ``data.mix`` and sources
    that are mixed in. A process keeps, on its device and in its checkpoints, a byte a pixel value
    of its images, and two more with momentum: of CIFAR-10, 154 and 461 MB.

    Differs from the authors' code in that a perturbation is kept as one of 255 levels of eps (so it
    follows a schedule of eps), the gradient that momentum adds up is scaled image by image, the
    attack climbs the loss without label smoothing, and the logits at the start are computed anew,
    in the model's training mode (a forward more). As theirs, it knows nothing of crops and mirrors:
    a perturbation stays where it is as the image moves.

    Args:
        eps: Radius of the L-inf ball, and length of the step, in pixel units, in (0, 1].
        momentum_decay: What is left of earlier epochs' gradients after each, in [0, 1).
        reset_epochs: Every so many epochs, all images start anew, at corners of the ball.
        prior_weight: The paper's lambda, >= 0: of the distance between logits, over images and
            classes.

    Source: Jia et al. 2022 (arXiv 2207.08859); values of their FGSM_MEP.py.
    """

    remembers: ClassVar[str] = "the perturbation of each image"

    eps: Annotated[Pixels, Le(1)] = default(8 / 255)
    momentum_decay: Annotated[Number, Ge(0), Lt(1)] = 0.3
    reset_epochs: Annotated[Whole, Ge(1)] = 40
    prior_weight: Annotated[Number, Ge(0)] = 10.0

    def remembering(
        self, images: Tensor, shape: tuple[int, int, int], device: torch.device
    ) -> "Priors":
        """What it keeps of a process's images.

        Args:
            images: Their indices, [n].
            shape: C, H, W.
        """
        return Priors(self, images, shape, device)

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """An image's first attack: from a corner of the ball."""
        return self.step(loss_fn, x.detach(), _corners(x, generator))[1]

    def step(self, loss_fn: LossFn, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step: the start, where it leads, and the gradient at the start, [B, C, H, W] each.

        Args:
            share: Of eps, where each image starts, in [-1, 1].
        """
        start = (x + self.eps * share).clamp(0, 1)
        grad = input_gradient(loss_fn, start)
        return start, self.along(grad, start, x), grad

    def along(self, direction: Tensor, start: Tensor, x: Tensor) -> Tensor:
        """Where a step by the signs of a direction leads."""
        return project(start + self.eps * direction.sign(), x, self.eps, "linf")


class Priors:
    """The perturbations of a process's images, each as the image's last attack has left it.

    Attributes:
        share: [n, C, H, W], int8: in 127ths of eps.
        momentum: [n, C, H, W], bfloat16, of mean absolute value about 1; None without.
    """

    def __init__(
        self, attack: FGSMPGI, images: Tensor, shape: tuple[int, int, int], device: torch.device
    ) -> None:
        self._reset_epochs = attack.reset_epochs
        self._images = images
        self._rows = torch.full((int(images.max()) + 1,), -1)
        self._rows[images] = torch.arange(len(images))
        size = (len(images), *shape)
        self.share = torch.zeros(size, dtype=torch.int8, device=device)
        self.momentum: Tensor | None = None
        if attack.momentum_decay > 0:
            self.momentum = torch.zeros(size, dtype=torch.bfloat16, device=device)

    def begin(self, epoch: int, generator_for: Callable[..., torch.Generator]) -> None:
        """An epoch begins: every ``reset_epochs`` with new starts, drawn by the epoch."""
        if epoch % self._reset_epochs == 0:
            drawn = _corners(self.share.cpu(), generator_for(epoch))
            self.share.copy_(drawn * _LEVELS)
            if self.momentum is not None:
                self.momentum.zero_()

    def visit(self, attack: FGSMPGI, images: Tensor) -> "Visit":
        """The attack on these images, [B] of indices."""
        rows = self._rows[images]
        assert (rows >= 0).all(), "images of another process"
        return Visit(attack, self, rows.to(self.share.device))

    def state(self) -> dict[str, Tensor]:
        """By names, all tensors: for a checkpoint."""
        found = {"images": self._images, "share": self.share}
        return found if self.momentum is None else found | {"momentum": self.momentum}

    def load(self, states: Iterable[dict[str, Tensor]], sharers: int = 1) -> None:
        """From the states of all processes, however many they were: an image's own is found."""
        missing = torch.ones(len(self._images), dtype=torch.bool)
        for state in states:
            images = state["images"]
            known = images < len(self._rows)
            rows = torch.where(known, self._rows[images.where(known, 0)], -1)
            here = rows >= 0
            missing[rows[here]] = False
            for name, kept in self.state().items():
                if name != "images":
                    kept[rows[here].to(kept.device)] = state[name][here].to(kept.device)
        if missing.any():
            raise ValueError(f"{int(missing.sum())} images have no perturbation in the checkpoint")


@dataclass(eq=False)
class Visit:
    """The attack on the images of one batch, which also tells the outer loss of their starts."""

    attack: FGSMPGI
    priors: Priors = field(repr=False)
    rows: Tensor = field(repr=False)
    start: Tensor | None = field(default=None, repr=False)  # [B, C, H, W], of the last attack

    @property
    def eps(self) -> float:
        return self.attack.eps

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        x, attack, priors = x.detach(), self.attack, self.priors
        share = priors.share[self.rows].to(x.dtype) / _LEVELS
        self.start, x_adv, grad = attack.step(loss_fn, x, share)
        kept = x_adv
        if priors.momentum is not None:
            mean = grad.flatten(1).abs().mean(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
            earlier = attack.momentum_decay * priors.momentum[self.rows].to(x.dtype)
            momentum = grad / mean.view(-1, 1, 1, 1) + earlier
            kept = attack.along(momentum, self.start, x)
            priors.momentum[self.rows] = momentum.to(torch.bfloat16)
        priors.share[self.rows] = ((kept - x) / attack.eps * _LEVELS).round().to(torch.int8)
        return x_adv

    def regularized(
        self, classifier: Callable[[Tensor], Tensor], out: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The outer loss with the distance between the logits at x_adv and at the start.

        Args:
            classifier: x [B, C, H, W] -> logits [B, K].
            out: Of the objective: ``loss`` and ``logits`` at x_adv.
        """
        if self.attack.prior_weight == 0:
            return out
        assert self.start is not None
        distance = mse_loss(out["logits"].float(), classifier(self.start).float())
        loss = out["loss"] + self.attack.prior_weight * distance
        return out | {"loss": loss, "prior_distance": distance.detach()}


def _corners(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """-1 or 1 for each pixel value, in the tensor's type and on its device."""
    return torch.empty_like(like).bernoulli_(generator=generator) * 2 - 1
