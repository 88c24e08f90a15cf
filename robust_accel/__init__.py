"""Distributed adversarial training on Accelerate, timm, datasets and AutoAttack."""

from robust_accel.attacks import FGSMRS, NFGSM, PGD, Attack
from robust_accel.comm import QSGD, AllReduce, compress_gradients
from robust_accel.models import PixelClassifier
from robust_accel.objectives import Adversarial, Objective
from robust_accel.optim import LAMB
from robust_accel.robust_model import RobustModel

__version__ = "0.1.0"

__all__ = [
    "FGSMRS",
    "LAMB",
    "NFGSM",
    "PGD",
    "QSGD",
    "Adversarial",
    "AllReduce",
    "Attack",
    "Objective",
    "PixelClassifier",
    "RobustModel",
    "compress_gradients",
]
