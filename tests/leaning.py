"""An objective that spoils the weights and hardly their average, for recipes."""

from typing import Any

from pydantic import PrivateAttr
from torch import Tensor

from robust_accel.objectives import Adversarial


class Leaning(Adversarial):
    """Adversarial training that, in some of its calls, makes all images of the first class.

    Args:
        at: The calls, from 1.
        by: What is added to the class's bias.
    """

    at: tuple[int, ...] = ()
    by: float = 20.0
    _calls: int = PrivateAttr(default=0)

    def loss(self, classifier: Any, x: Tensor, x_adv: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = super().loss(classifier, x, x_adv, labels)
        self._calls += 1
        if self._calls in self.at:
            *_, bias = classifier.parameters()
            bias.data[0] += self.by
        return out
