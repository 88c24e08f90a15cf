"""TRADES: accuracy on clean images, and predictions that do not move under attack."""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn.functional import log_softmax

from robust_accel.objectives.base import (
    AttackLoss,
    Classifier,
    LogitLoss,
    climbed,
    labeled_cross_entropy,
    logits_of_both,
)
from robust_accel.settings import Flag, Number, Settings


class Trades(Settings):
    """CE(f(x), y) + beta * KL(f(x) || f(x_adv)); the attack climbs the same KL.

    An image without a label (-1) takes part in the second term only: the first is averaged over
    the labelled images of the batch, the second over all. With a teacher's labels on all images
    this is robust self-training.

    Args:
        beta: Weight of robustness against clean accuracy, >= 0.
        label_smoothing: in [0, 1); of the first term.
        batchnorm: How x and x_adv go through BatchNorm: ``apart``, one forward each, or
            ``together`` as one batch of 2B. The authors' code forwards x, x_adv and x again, for
            the KL's target: ``apart`` but for BatchNorm's running statistics, which see x twice
            there, and for dropout, which draws anew.
        online_targets: Take the clean prediction of the second term as a constant target, as the
            online targets of UAT do; TRADES also moves it.
        attack_loss: What the attack climbs: ``kl``, as the authors do, or the ``cross_entropy`` (or
            ``cw``, ``dlr``, see ``climbed``) to the class predicted at x, which needs no label
            either. While predictions are unsure the
            KL grows most where they become surer, which is no attack: a small or young network
            learns little from it, above all in one step.

    Source: Zhang et al. 2019 (arXiv 1901.08573), equation (5); without labels Stanforth et al. 2019
    (arXiv 1905.13725); robust self-training Carmon et al. 2019 (arXiv 1905.13736). In equation (2)
    of DAT, phi is beta * KL and lambda is 1. The KL's gradient vanishes at x: an attack on it must
    start elsewhere (``attack.random_start: gaussian`` is TRADES' own).
    """

    takes_unlabeled: ClassVar[bool] = True
    takes_soft_labels: ClassVar[bool] = True

    beta: Annotated[Number, Ge(0)] = 6.0
    label_smoothing: Annotated[Number, Ge(0), Lt(1)] = 0.0
    batchnorm: Literal["apart", "together"] = "apart"
    online_targets: Flag = False
    attack_loss: Literal["kl"] | AttackLoss = "kl"

    def inner_loss(
        self, classifier: Classifier, x: Tensor, labels: Tensor
    ) -> Callable[[Tensor], Tensor]:
        return away_from_clean(classifier, x, self.attack_loss)[0]

    def loss(
        self,
        classifier: Classifier,
        x: Tensor,
        x_adv: Tensor,
        labels: Tensor,
        *,
        num_labeled: float | None = None,
    ) -> dict[str, Tensor]:
        clean, logits = logits_of_both(classifier, x, x_adv, self.batchnorm)
        clean_loss = labeled_cross_entropy(clean, labels, self.label_smoothing, num_labeled)
        target = log_softmax(clean.detach() if self.online_targets else clean, dim=1)
        divergence = kl_divergence(target, log_softmax(logits, dim=1)).mean()
        return {
            "loss": clean_loss + self.beta * divergence,
            "logits": logits,
            "clean_loss": clean_loss.detach(),
            "divergence": divergence.detach(),
        }


def away_from_clean(
    classifier: Classifier, x: Tensor, loss: Literal["kl"] | AttackLoss
) -> tuple[LogitLoss, Tensor]:
    """What leads away from the prediction at x, see ``Trades.attack_loss``, and its logits there.

    Args:
        x: [B, C, H, W] in [0, 1]; the logits are [B, K], detached.
    """
    with torch.no_grad():
        logits = classifier(x)
    clean = log_softmax(logits, dim=1)
    if loss != "kl":
        return climbed(classifier, clean.argmax(dim=1), loss), logits
    found = LogitLoss(
        classifier,
        clean.argmax(dim=1),
        lambda adversarial: kl_divergence(clean, log_softmax(adversarial, dim=1)),
    )
    return found, logits


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row: [B, K] log-probabilities -> [B]."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)
