"""Distributed adversarial training on Accelerate, timm, datasets and AutoAttack.

What is public is imported when it is used: the command line answers before torch is there. The
networks that timm does not have are registered with it by ``import robust_accel.models``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_accel.api import Measured, Measurement, Run, certify, evaluate, load_run, train
    from robust_accel.attacks import (
        APGD,
        DDN,
        FGSMPGI,
        FGSMRS,
        NFGSM,
        PGD,
        Attack,
        MultiNorm,
        NormBall,
    )
    from robust_accel.comm import QSGD, AllReduce, compress_gradients
    from robust_accel.evaluation.certify_images import CertifySettings
    from robust_accel.evaluation.settings import EvaluateSettings
    from robust_accel.integrations.in_place import make_robust
    from robust_accel.models import PixelClassifier
    from robust_accel.objectives import (
        AWP,
        IKL,
        Adversarial,
        GradAlign,
        Mart,
        Objective,
        Smoothing,
        Trades,
    )
    from robust_accel.optim import LAMB
    from robust_accel.robust_model import RobustModel
    from robust_accel.trained_model import load_model

__version__ = "0.2.0.dev0"

_WHERE = {
    "api": ("Measured", "Measurement", "Run", "certify", "evaluate", "load_run", "train"),
    "attacks": (
        "APGD",
        "DDN",
        "FGSMPGI",
        "FGSMRS",
        "NFGSM",
        "PGD",
        "Attack",
        "MultiNorm",
        "NormBall",
    ),
    "comm": ("QSGD", "AllReduce", "compress_gradients"),
    "evaluation.certify_images": ("CertifySettings",),
    "evaluation.settings": ("EvaluateSettings",),
    "integrations.in_place": ("make_robust",),
    "models": ("PixelClassifier",),
    "objectives": (
        "AWP",
        "IKL",
        "Adversarial",
        "GradAlign",
        "Mart",
        "Objective",
        "Smoothing",
        "Trades",
    ),
    "optim": ("LAMB",),
    "robust_model": ("RobustModel",),
    "trained_model": ("load_model",),
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [
    "APGD",
    "AWP",
    "DDN",
    "FGSMPGI",
    "FGSMRS",
    "IKL",
    "LAMB",
    "NFGSM",
    "PGD",
    "QSGD",
    "Adversarial",
    "AllReduce",
    "Attack",
    "CertifySettings",
    "EvaluateSettings",
    "GradAlign",
    "Mart",
    "Measured",
    "Measurement",
    "MultiNorm",
    "NormBall",
    "Objective",
    "PixelClassifier",
    "RobustModel",
    "Run",
    "Smoothing",
    "Trades",
    "certify",
    "compress_gradients",
    "evaluate",
    "load_model",
    "load_run",
    "make_robust",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
