"""The protocol that every objective follows, and what several of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

NOT_A_NUMBER = -1  # the prediction where logits are not finite

Classifier = Callable[[Tensor], Tensor]
"""x: [B, C, H, W] in [0, 1] -> logits [B, K]."""


AttackLoss = Literal["cross_entropy", "cw", "dlr"]


class Objective(Protocol):
    """The two levels of min-max problem (2).

    A class with a method ``for_batch(x) -> Objective`` is asked for the objective of each batch:
    what attack and update must share, such as noise, is drawn there.

    A class with ``takes_unlabeled = True`` also takes images without a label, whose label is -1,
    and its ``loss`` has an option ``num_labeled`` (see ``labeled_cross_entropy``).

    A class with ``takes_soft_labels = True`` also takes probabilities [B, K] as labels, which
    ``data.mix`` makes.
    """

    def inner_loss(
        self, classifier: Classifier, x: Tensor, labels: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """Return the function x_adv -> [B] that the attack climbs.

        What does not depend on x_adv (TRADES' clean prediction) is computed here, once. Attacks
        that look at predictions (DDN) need a ``LogitLoss``, or an object with its two methods.
        """
        ...

    def loss(
        self, classifier: Classifier, x: Tensor, x_adv: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the outer loss: a scalar ``loss``, ``logits`` [B, K] at x_adv, and named parts."""
        ...


@dataclass(frozen=True, eq=False)
class LogitLoss:
    """A loss of the logits as an attack climbs it, which can tell who is predicted wrongly.

    Attributes:
        logits_of: x [B, C, H, W] -> logits, or log-probabilities, [B, K].
        labels: The classes [B] that are right, or probabilities [B, K] of which the largest is.
        losses_of: logits [B, K] -> losses [B].
    """

    logits_of: Classifier
    labels: Tensor
    losses_of: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] in [0, 1] -> losses [B]."""
        return self.losses_of(self.logits_of(x))

    def judged(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The losses [B], and whether the prediction is wrong: [B], bool."""
        logits = self.logits_of(x)
        labels = self.labels.argmax(dim=1) if self.labels.ndim > 1 else self.labels
        return self.losses_of(logits), predicted(logits.detach()) != labels


def cross_entropy_of(classifier: Classifier, labels: Tensor) -> LogitLoss:
    """The plain cross-entropy as an attack climbs it: x_adv -> [B].

    Args:
        labels: [B] class indices, or [B, K] probabilities.
    """
    return LogitLoss(
        classifier, labels, lambda logits: cross_entropy(logits, labels, reduction="none")
    )


def climbed(classifier: Classifier, labels: Tensor, loss: AttackLoss) -> LogitLoss:
    """A loss by its name as an attack climbs it: x_adv -> [B].

    ``cw``: the largest other logit minus that of the label, positive where the prediction is wrong
    (Carlini and Wagner 2017, arXiv 1608.04644). ``dlr``: the same, divided by the distance between
    the largest and the third largest logit, so that no scale of the logits hides its gradient
    (Croce and Hein 2020, arXiv 2003.01690, equation (6)).

    Args:
        labels: [B] class indices, or [B, K] probabilities, of which the largest is the label.

    Raises:
        ValueError: ``dlr`` of fewer than three classes.
    """
    if loss == "cross_entropy":
        return cross_entropy_of(classifier, labels)
    own = labels.argmax(dim=1) if labels.ndim > 1 else labels

    def margins(logits: Tensor) -> Tensor:
        right = logits.gather(1, own[:, None])
        margin = logits.scatter(1, own[:, None], -torch.inf).amax(dim=1) - right[:, 0]
        if loss == "cw":
            return margin
        if logits.shape[1] < 3:
            raise ValueError(f"the loss dlr needs three classes, here are {logits.shape[1]}")
        top = logits.topk(3, dim=1).values
        return margin / (top[:, 0] - top[:, 2] + 1e-12)

    return LogitLoss(classifier, own, margins)


def predicted(logits: Tensor) -> Tensor:
    """Classes [B] of logits [B, K]; NOT_A_NUMBER where one is not finite: argmax has a class."""
    return logits.argmax(dim=1).masked_fill(~logits.isfinite().all(dim=1), NOT_A_NUMBER)


def logits_of_both(
    classifier: Classifier, x: Tensor, x_adv: Tensor, batchnorm: Literal["apart", "together"]
) -> tuple[Tensor, Tensor]:
    """Logits [B, K] at x and at x_adv, from one forward each or from one of both."""
    if batchnorm == "apart":
        return classifier(x), classifier(x_adv)
    clean, adversarial = classifier(torch.cat([x, x_adv])).chunk(2)
    return clean, adversarial


def labeled_cross_entropy(
    logits: Tensor, labels: Tensor, label_smoothing: float, num_labeled: float | None = None
) -> Tensor:
    """Sum over the images that have a label (-1 is none), divided by their number. A scalar.

    Args:
        labels: [B] class indices, or [B, K] probabilities, which all images then have.
        num_labeled: Divide by this instead: the mean number of them in the parts of a batch that
            are averaged (processes, micro-batches), each of which would else weigh the same,
            however few it holds.
    """
    if labels.is_floating_point():
        return cross_entropy(logits, labels, label_smoothing=label_smoothing)
    total = cross_entropy(
        logits, labels, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing
    )
    own = (labels != -1).sum().clamp(min=1)
    return total / (own if num_labeled is None else num_labeled)
