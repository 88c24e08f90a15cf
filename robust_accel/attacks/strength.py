"""How strong an attack is while training warms up: the same attack in a smaller ball."""

import math
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from robust_accel.attacks.base import Attack
from robust_accel.settings import Number, Settings

_LENGTHS = ("eps", "step_size", "init_norm")


class EpsSchedule(Settings):
    """The recipe's ``train.eps_schedule``: the attack's eps grows with each step.

    Its step size grows with it. Validation and evaluation are always at the whole eps.

    Args:
        shape: ``linear``, or ``sine``: the first quarter of a sine, fast at first and slow at last.
        epochs: When eps is whole, a fraction allowed; at the end of the training when not given.
        start: The share of eps from which it grows, in [0, 1).
    """

    shape: Literal["linear", "sine"] = "linear"
    epochs: Annotated[Number, Gt(0)] | None = None
    start: Annotated[Number, Ge(0), Lt(1)] = 0.0

    def share(self, epoch: float, total_epochs: float) -> float:
        """Of eps, in (0, 1].

        Args:
            epoch: Epochs that are done when the step is, > 0.
            total_epochs: Length of the run.
        """
        way = min(1.0, epoch / (self.epochs or total_epochs))
        if self.shape == "sine":
            way = math.sin(math.pi / 2 * way)
        return self.start + (1 - self.start) * way


def scaled(attack: Attack, share: float) -> Attack:
    """The attack with all its lengths, in pixel units, multiplied by a share of 1."""
    if share >= 1:
        return attack
    settings: Any = attack
    lengths = {key: getattr(settings, key, None) for key in _LENGTHS}
    return settings.model_copy(update={k: share * v for k, v in lengths.items() if v is not None})


def scalable(attack: Any) -> bool:
    """Whether it has an eps that ``scaled`` can change."""
    return getattr(attack, "eps", None) is not None and hasattr(attack, "model_copy")
