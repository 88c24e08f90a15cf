"""IKL: TRADES whose divergence is decoupled, moves both predictions, and weighs classes."""

from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn.functional import log_softmax, one_hot, softmax

from robust_accel.objectives.base import (
    AttackLoss,
    Classifier,
    labeled_cross_entropy,
    logits_of_both,
)
from robust_accel.objectives.trades import away_from_clean
from robust_accel.settings import Flag, Number, Settings


class IKL(Settings):
    """CE(f(x), y) + alpha * CE(softmax f(x), f(x_adv)) + beta * wMSE(f(x), f(x_adv)).

    The second term's target is a constant. wMSE is a quarter of the sum over pairs of classes j, k
    of w_j w_k ((f_j - f_k)(x) - (f_j - f_k)(x_adv))^2: half the variance of f(x) - f(x_adv) under
    the weights w, a distribution over classes.

    ``weights: image`` (w is softmax f(x), a constant) and ``symmetric: false`` (wMSE moves f(x)
    alone) with alpha = beta = 1 is DKL, whose gradient is that of TRADES' KL (the paper's Theorem
    1). ``weights: class`` takes w from the mean prediction over all images of the label's class in
    the epoch before, softened by ``temperature`` (in the first epoch all classes weigh the same):
    the training loop keeps that, so it is for ``robust-accel train`` alone.

    Differs from the authors' code in that class means are those of the clean predictions from which
    the attack starts, and that the attack climbs the KL alone on CIFAR-100, too.

    Args:
        alpha: Weight of the second term, >= 0.
        beta: Weight of wMSE, >= 0.
        temperature: Of the class means, > 0.
        weights: ``class`` or ``image``.
        symmetric: Whether wMSE moves the prediction at x_adv, too.
        batchnorm, attack_loss: As of TRADES.

    Source: Cui et al. 2023 (arXiv 2305.13948); values and names of their train_dkl_cifar10.py.
    """

    takes_soft_labels: ClassVar[bool] = True

    alpha: Annotated[Number, Ge(0)] = 4.0
    beta: Annotated[Number, Ge(0)] = 20.0
    temperature: Annotated[Number, Gt(0)] = 4.0
    weights: Literal["class", "image"] = "class"
    symmetric: Flag = True
    batchnorm: Literal["apart", "together"] = "apart"
    attack_loss: Literal["kl"] | AttackLoss = "kl"

    @property
    def remembers(self) -> str:
        """What it needs the training loop for."""
        kept = "the mean prediction of each class (weights: image does not)"
        return kept if self.weights == "class" else ""

    def remembering(self, num_classes: int, device: torch.device) -> "ClassMeans":
        """The objective with its class means."""
        return ClassMeans(self, num_classes, device)

    def inner_loss(
        self, classifier: Classifier, x: Tensor, labels: Tensor
    ) -> Callable[[Tensor], Tensor]:
        return away_from_clean(classifier, x, self.attack_loss)[0]

    def loss(
        self, classifier: Classifier, x: Tensor, x_adv: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        return self.weighted(classifier, x, x_adv, labels, None)

    def weighted(
        self,
        classifier: Classifier,
        x: Tensor,
        x_adv: Tensor,
        labels: Tensor,
        weights: Tensor | None,
    ) -> dict[str, Tensor]:
        """The loss with each image's weights [B, K]; its own prediction when not given."""
        clean, logits = logits_of_both(classifier, x, x_adv, self.batchnorm)
        clean_loss = labeled_cross_entropy(clean, labels, 0.0)
        target = softmax(clean.detach().float(), dim=1)
        soft = -(target * log_softmax(logits.float(), dim=1)).sum(dim=1).mean()
        difference = clean.float() - (logits if self.symmetric else logits.detach()).float()
        distance = _half_variance(difference, target if weights is None else weights).mean()
        return {
            "loss": clean_loss + self.alpha * soft + self.beta * distance,
            "logits": logits,
            "clean_loss": clean_loss.detach(),
            "soft_loss": soft.detach(),
            "distance": distance.detach(),
        }


class ClassMeans:
    """``IKL`` with the mean prediction of each class, of the epoch before.

    Attributes:
        means: [K, K], float32: a row is the mean prediction on a class's images.
        sums: [K, K], of this epoch and process so far.
    """

    def __init__(self, settings: IKL, num_classes: int, device: torch.device) -> None:
        self.settings = settings
        self.means = torch.full((num_classes, num_classes), 1 / num_classes, device=device)
        self.sums = torch.zeros_like(self.means)

    def begin(self, epoch: int, total: Callable[[Tensor], Tensor]) -> None:
        """An epoch begins: the last one's sums become means.

        Args:
            total: Adds up a tensor over all processes.
        """
        sums = total(self.sums)
        counts = sums.sum(dim=1, keepdim=True)
        # a class of which no image was seen stays what it was
        self.means = torch.where(counts > 0, sums / counts.clamp_min(1e-12), self.means)
        self.sums = torch.zeros_like(self.sums)

    def state(self) -> dict[str, Tensor]:
        """By names, all tensors: for a checkpoint."""
        return {"means": self.means, "sums": self.sums}

    def load(self, states: Sequence[dict[str, Tensor]], sharers: int) -> None:
        """From states, which ``sharers`` processes load alike."""
        self.means = states[0]["means"].to(self.means.device)
        sums = torch.stack([state["sums"] for state in states]).sum(dim=0)
        self.sums = (sums / sharers).to(self.sums.device)

    def inner_loss(
        self, classifier: Classifier, x: Tensor, labels: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """What the attack climbs; the clean predictions, made once a batch, are counted."""
        loss_fn, clean = away_from_clean(classifier, x, self.settings.attack_loss)
        predictions = softmax(clean.detach().float() / self.settings.temperature, dim=1)
        whole = predictions.isfinite().all(dim=1, keepdim=True)
        self.sums += _product(self._of_classes(labels).T, torch.where(whole, predictions, 0))
        return loss_fn

    def loss(
        self, classifier: Classifier, x: Tensor, x_adv: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        weights = _product(self._of_classes(labels), self.means)
        return self.settings.weighted(classifier, x, x_adv, labels, weights)

    def _of_classes(self, labels: Tensor) -> Tensor:
        """Shares of the classes [B, K]."""
        return (labels if labels.ndim > 1 else one_hot(labels, len(self.means))).float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of two matrices of float32, which autocast would round to half precision."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _half_variance(values: Tensor, weights: Tensor) -> Tensor:
    """Of values [B, K] under weights [B, K] that sum to one: [B]."""
    mean = (weights * values).sum(dim=1, keepdim=True)
    return (weights * (values - mean).square()).sum(dim=1) / 2
