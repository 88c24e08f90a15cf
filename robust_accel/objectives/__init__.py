"""What the attack climbs and the optimizer descends: one file an objective, one line a name."""

from robust_accel.objectives.adversarial import Adversarial
from robust_accel.objectives.base import Objective

OBJECTIVES = {"adversarial": Adversarial}

__all__ = ["OBJECTIVES", "Adversarial", "Objective"]
