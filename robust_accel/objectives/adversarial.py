"""Adversarial training with an optional clean term."""

from collections.abc import Callable
from typing import Annotated, ClassVar

from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn.functional import cross_entropy

from robust_accel.objectives.base import AttackLoss, Classifier, climbed
from robust_accel.objectives.grad_align import GradAlign
from robust_accel.settings import Number, Settings


class Adversarial(Settings):
    """clean_weight * CE(f(x), y) + CE(f(x_adv), y), averaged over the batch.

    Args:
        clean_weight: lambda of equation (2), >= 0. 0 is adversarial training (1); the authors'
            published code trains with 1.
        label_smoothing: in [0, 1); of the outer loss only: the attack climbs the plain loss.
        attack_loss: What the attack climbs, see ``climbed``: ``cross_entropy``, ``cw`` or ``dlr``.
        grad_align: Add GradAlign, for one-step attacks: ``{eps: 8/255, weight: 0.2}``.

    Source: equation (2) of DAT with phi = l(theta, x + delta; y).
    """

    takes_soft_labels: ClassVar[bool] = True

    clean_weight: Annotated[Number, Ge(0)] = 0.0
    label_smoothing: Annotated[Number, Ge(0), Lt(1)] = 0.0
    attack_loss: AttackLoss = "cross_entropy"
    grad_align: GradAlign | None = None

    def inner_loss(
        self, classifier: Classifier, x: Tensor, labels: Tensor
    ) -> Callable[[Tensor], Tensor]:
        return climbed(classifier, labels, self.attack_loss)

    def loss(
        self, classifier: Classifier, x: Tensor, x_adv: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        logits = classifier(x_adv)
        loss = cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        parts = {"adv_loss": loss.detach()}
        if self.clean_weight:
            clean = cross_entropy(classifier(x), labels, label_smoothing=self.label_smoothing)
            parts["clean_loss"] = clean.detach()
            loss = self.clean_weight * clean + loss
        if self.grad_align is not None:
            alignment = self.grad_align(classifier, x, labels)
            parts["grad_alignment"] = alignment.detach()
            loss = loss + self.grad_align.weight * (1 - alignment)
        return {"loss": loss, "logits": logits, **parts}
