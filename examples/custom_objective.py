"""An objective of one's own, by name in a recipe: objective.name=custom_objective:MarginLoss.

PYTHONPATH=examples robust-accel train quickstart objective.name=custom_objective:MarginLoss
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import multi_margin_loss

from robust_accel.objectives import Classifier
from robust_accel.settings import Number, Settings


class MarginLoss(Settings):
    """The hinge loss, attacked and minimised; its fields are the recipe's keys."""

    margin: Number = 1.0

    def inner_loss(
        self, classifier: Classifier, x: Tensor, labels: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """What the attack climbs: x_adv -> [B]."""
        return lambda x_adv: multi_margin_loss(
            classifier(x_adv), labels, margin=self.margin, reduction="none"
        )

    def loss(
        self, classifier: Classifier, x: Tensor, x_adv: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """What the optimizer descends."""
        logits = classifier(x_adv)
        return {"loss": multi_margin_loss(logits, labels, margin=self.margin), "logits": logits}
