"""The protocol that every objective follows."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Classifier = Callable[[Tensor], Tensor]
"""x: [B, C, H, W] in [0, 1] -> logits [B, K]."""


class Objective(Protocol):
    """The two levels of min-max problem (2)."""

    def inner_loss(
        self, classifier: Classifier, x: Tensor, labels: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """Return the function x_adv -> [B] that the attack climbs.

        What does not depend on x_adv (TRADES' clean prediction) is computed here, once.
        """
        ...

    def loss(
        self, classifier: Classifier, x: Tensor, x_adv: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Return the outer loss: a scalar ``loss``, ``logits`` [B, K] at x_adv, and named parts."""
        ...
