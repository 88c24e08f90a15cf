"""Adversarial weight perturbation: the outer loss is taken at attacked weights, too."""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.func import functional_call

from robust_accel.settings import Number, Settings, Whole

_SCALE = 1024.0  # of mean losses in fp16, whose gradients underflow


class AWP(Settings):
    """Moves each weight tensor up the outer loss by gamma times its norm; the loss is taken there.

    The gradient at the moved weights updates the weights where they were. Each process moves them
    by the gradient of its own images: nothing is sent.

    Args:
        gamma: Size of the step relative to the tensor's norm, > 0.
        warmup_epochs: Epochs without it, in the training loop.

    Source: Wu et al. 2020 (arXiv 2004.05884), equation (10), with one step as in their code, which
    moves tensors of two dimensions and more; gamma 0.01 for AT and 0.005 for TRADES.
    """

    gamma: Annotated[Number, Gt(0)] = 0.005
    warmup_epochs: Annotated[Whole, Ge(0)] = 0

    def __call__(self, classifier: nn.Module, loss_fn: Callable[[], Tensor]) -> "Perturbed":
        """The classifier at the moved weights.

        Args:
            classifier: Whose weights are moved; they stay as they are.
            loss_fn: The outer loss of the classifier, a scalar; it must not change BatchNorm's
                statistics.

        Returns:
            x -> logits, differentiable in the classifier's own parameters.

        Raises:
            ValueError: There are no parameters, as in a replica of ``torch.nn.DataParallel``.
            RuntimeError: The loss gives no weight a gradient.
        """
        parameters = dict(classifier.named_parameters())
        if not parameters:
            raise ValueError(
                "adversarial weight perturbation does not support torch.nn.DataParallel, whose "
                "replicas have no parameters: use DistributedDataParallel"
            )
        weights = {n: p for n, p in parameters.items() if p.requires_grad and p.ndim > 1}
        grads: Sequence[Tensor | None] = ()
        if weights:
            loss = loss_fn()
            device = loss.device.type
            if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.half:
                loss = _SCALE * loss  # only directions count
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        moved = {
            name: weight + self._step(weight.detach(), grad)
            for (name, weight), grad in zip(weights.items(), grads, strict=True)
            if grad is not None
        }
        if not moved:
            raise RuntimeError(
                f"adversarial weight perturbation: none of the {len(weights)} weights with two "
                "dimensions or more that are trained gets a gradient: there is nothing to move"
            )
        return Perturbed(classifier, moved)

    def _step(self, weight: Tensor, grad: Tensor) -> Tensor:
        norm = grad.norm()
        return grad * torch.where(norm > 0, self.gamma * weight.norm() / norm, 0.0)


class Perturbed(nn.Module):
    """A classifier whose forward uses other weights in place of some of its own.

    Attributes:
        moved: These, by name.
    """

    def __init__(self, classifier: nn.Module, moved: dict[str, Tensor]) -> None:
        super().__init__()
        self.classifier, self.moved = classifier, moved

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.classifier, self.moved, (x,))
