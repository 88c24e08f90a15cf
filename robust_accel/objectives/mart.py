"""MART: adversarial training that weighs images by how wrong their clean prediction is."""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import log_softmax

from robust_accel.objectives.base import Classifier, cross_entropy_of, logits_of_both
from robust_accel.objectives.trades import kl_divergence
from robust_accel.settings import Number, Settings

_TINY = 1e-4  # of the authors' code: log(1 + tiny - p) stays finite at p = 1


class Mart(Settings):
    """BCE(f(x_adv), y) + beta * KL(f(x) || f(x_adv)) * (1 - p_y(x)); the attack climbs the CE.

    BCE is the cross-entropy plus -log(1 - p) of the most likely wrong class, the margin term.

    Args:
        beta: The paper's lambda, >= 0.
        batchnorm: How x and x_adv go through BatchNorm: ``apart``, one forward each as in the
            authors' code, or ``together`` as one batch of 2B.

    Source: Wang et al. 2020, "Improving Adversarial Robustness Requires Revisiting Misclassified
    Examples" (ICLR), equation (11).
    """

    beta: Annotated[Number, Ge(0)] = 5.0
    batchnorm: Literal["apart", "together"] = "apart"

    def inner_loss(
        self, classifier: Classifier, x: Tensor, labels: Tensor
    ) -> Callable[[Tensor], Tensor]:
        return cross_entropy_of(classifier, labels)

    def loss(
        self, classifier: Classifier, x: Tensor, x_adv: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        if labels.is_floating_point():
            raise ValueError("MART needs class indices [B] as labels, got probabilities [B, K]")
        clean, logits = logits_of_both(classifier, x, x_adv, self.batchnorm)
        log_p, log_q = log_softmax(clean, dim=1), log_softmax(logits, dim=1)
        own = labels[:, None]  # [B, 1]
        wrong = log_q.exp().scatter(1, own, 0.0).amax(dim=1)  # likeliest other class
        adv_loss = (torch.log1p(_TINY - wrong).neg() - log_q.gather(1, own)[:, 0]).mean()
        weight = 1 - log_p.gather(1, own)[:, 0].exp()
        divergence = (kl_divergence(log_p, log_q) * weight).mean()
        return {
            "loss": adv_loss + self.beta * divergence,
            "logits": logits,
            "adv_loss": adv_loss.detach(),
            "divergence": divergence.detach(),
        }
