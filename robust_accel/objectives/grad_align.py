"""GradAlign: the loss's gradient in the pixels is to be alike throughout the ball."""

from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from robust_accel.objectives.base import Classifier
from robust_accel.settings import Number, Pixels, Settings, default


class GradAlign(Settings):
    """weight * (1 - the cosine of the loss's gradients at x and at a random point in the ball).

    Where they differ, one step does not lead to where the loss is large: it keeps one-step training
    from catastrophic overfitting. It is differentiated twice, at the price of some five passes a
    step. Images without a gradient at one of the points take no part.

    Args:
        eps: Radius of the L-inf ball from which the point is drawn, uniformly; the attack's.
        weight: lambda, > 0.

    Source: Andriushchenko and Flammarion 2020 (arXiv 2007.02617), equation (4). Theirs does not
    clip the point to [0, 1].
    """

    eps: Annotated[Pixels, Le(1)] = default(8 / 255)
    weight: Annotated[Number, Gt(0)] = 0.2

    def __call__(self, classifier: Classifier, x: Tensor, labels: Tensor) -> Tensor:
        """The mean cosine over the images, a scalar that can be differentiated in the weights.

        Args:
            x: [B, C, H, W] in [0, 1].
            labels: [B] class indices, or [B, K] probabilities.
        """
        point = (x + torch.empty_like(x).uniform_(-self.eps, self.eps)).clamp(0, 1)
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
