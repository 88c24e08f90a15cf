"""Distributed adversarial training on Accelerate, timm, datasets and AutoAttack."""

from robust_accel.attacks import DDN, FGSMRS, NFGSM, PGD, Attack
from robust_accel.comm import QSGD, AllReduce, compress_gradients
from robust_accel.evaluation.measure import measure
from robust_accel.integrations.in_place import make_robust
from robust_accel.models import PixelClassifier
from robust_accel.objectives import AWP, Adversarial, Mart, Objective, Smoothing, Trades
from robust_accel.optim import LAMB
from robust_accel.robust_model import RobustModel
from robust_accel.trained_model import load_model

__version__ = "0.1.0"

__all__ = [
    "AWP",
    "DDN",
    "FGSMRS",
    "LAMB",
    "NFGSM",
    "PGD",
    "QSGD",
    "Adversarial",
    "AllReduce",
    "Attack",
    "Mart",
    "Objective",
    "PixelClassifier",
    "RobustModel",
    "Smoothing",
    "Trades",
    "compress_gradients",
    "load_model",
    "make_robust",
    "measure",
]
