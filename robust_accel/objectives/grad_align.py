"""GradAlign: the loss's gradient in the pixels is to be alike throughout the ball."""

import math
from typing import Annotated

import torch
from annotated_types import Gt
from pydantic import field_validator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from robust_accel.objectives.base import Classifier
from robust_accel.settings import Number, OptionalPixels, Settings, default, eps_text


class GradAlign(Settings):
    """weight * (1 - the cosine of the loss's gradients at x and at a random point in the ball).

    Where they differ, one step does not lead to where the loss is large: it keeps one-step training
    from catastrophic overfitting. It is differentiated twice, at the price of some five passes a
    step. Images without a gradient at one of the points take no part.

    Args:
        eps: Radius of the L-inf ball from which the point is drawn, uniformly: the attack's, any
            other is refused. A number stays where ``train.eps_schedule`` or
            ``train.eps_warmup_epochs`` makes the attack's smaller; null is what the attack's is in
            each step.
        weight: lambda, > 0.

    Source: Andriushchenko and Flammarion 2020 (arXiv 2007.02617), equation (4). Theirs does not
    clip the point to [0, 1].
    """

    eps: OptionalPixels = default(8 / 255)
    weight: Annotated[Number, Gt(0)] = 0.2

    @field_validator("eps")
    @classmethod
    def _in_pixel_units(cls, eps: float | None) -> float | None:
        if eps is not None and eps > 1:
            raise ValueError("in pixel units an L-inf eps is at most 1, like 8/255")
        return eps

    def misfit(self, attack: object) -> str | None:
        """Why its ball is none of an attack's; None where it is."""
        if hasattr(attack, "balls"):
            return "is of one L-inf ball, and the attack has balls of other norms"
        norm = str(getattr(attack, "norm", "linf")).lower()
        given, own = self.eps, getattr(attack, "eps", None)
        if given is None and own is None:
            return "null is the attack's, which has none: give it"
        is_same = given is None or own is None or math.isclose(given, own, rel_tol=1e-6)
        if norm == "linf" and is_same:
            return None
        said, found = ("null" if eps is None else eps_text(eps) for eps in (given, own))
        return (
            f"{said} is of an L-inf ball, and the attack's is {norm}, eps {found}: they "
            "are to be the same (null, in a script None, is the attack's)"
        )

    def within(self, attack: object) -> "GradAlign":
        """The same with an eps: the attack's, if it has none of its own.

        Raises:
            ValueError: ``grad_align.eps: ...``: its ball is none of the attack's.
        """
        if why := self.misfit(attack):
            raise ValueError(f"grad_align.eps: {why}")
        eps = getattr(attack, "eps", None) if self.eps is None else self.eps
        return self.model_copy(update={"eps": eps})

    def __call__(self, classifier: Classifier, x: Tensor, labels: Tensor) -> Tensor:
        """The mean cosine over the images, a scalar that can be differentiated in the weights.

        Args:
            x: [B, C, H, W] in [0, 1].
            labels: [B] class indices, or [B, K] probabilities.

        Raises:
            ValueError: Its eps is None: ``within`` gives the attack's.
        """
        eps = self.eps
        if eps is None:
            raise ValueError("grad_align.eps: null is the attack's, which is unknown here: give it")
        point = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        # the fused kinds of attention have no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            here, there = (_gradient(classifier, z, labels) for z in (x, point))
        known = ((here != 0).any(dim=1) & (there != 0).any(dim=1)).to(here.dtype)
        cosines = (_unit(here) * _unit(there)).sum(dim=1)
        return (known * cosines).sum() / known.sum().clamp_min(1)


def _gradient(classifier: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    """Of the summed loss in x: [B, C * H * W], with its graph."""
    x = x.detach().requires_grad_()
    loss = cross_entropy(classifier(x), labels, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return grad.flatten(1)


def _unit(rows: Tensor) -> Tensor:
    """Rows [B, d] of length one; a row of zeros stays one, and so does its gradient."""
    tiny = torch.finfo(rows.dtype).tiny
    rows = rows / rows.detach().abs().amax(dim=1, keepdim=True).clamp_min(tiny)  # squares underflow
    return rows / rows.square().sum(dim=1, keepdim=True).clamp_min(tiny).sqrt()
