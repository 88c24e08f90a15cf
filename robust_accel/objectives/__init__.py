"""What the attack climbs and what is trained: one file an objective, one line a name."""

from robust_accel.objectives.adversarial import Adversarial
from robust_accel.objectives.base import (
    NOT_A_NUMBER,
    AttackLoss,
    Classifier,
    LogitLoss,
    Objective,
    climbed,
    cross_entropy_of,
    predicted,
)
from robust_accel.objectives.grad_align import GradAlign
from robust_accel.objectives.ikl import IKL
from robust_accel.objectives.mart import Mart
from robust_accel.objectives.smoothing import Smoothing
from robust_accel.objectives.trades import Trades
from robust_accel.objectives.weight_perturbation import AWP

OBJECTIVES = {
    "adversarial": Adversarial,
    "trades": Trades,
    "ikl": IKL,
    "mart": Mart,
    "smoothing": Smoothing,
}

__all__ = [
    "AWP",
    "IKL",
    "NOT_A_NUMBER",
    "OBJECTIVES",
    "Adversarial",
    "AttackLoss",
    "Classifier",
    "GradAlign",
    "LogitLoss",
    "Mart",
    "Objective",
    "Smoothing",
    "Trades",
    "climbed",
    "cross_entropy_of",
    "predicted",
]
