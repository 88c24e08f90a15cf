"""Classifiers on pixels: any timm model by name, and CIFAR's own networks."""

import robust_accel.models.cifar  # noqa: F401  (registers the CIFAR models with timm)
from robust_accel.models.classifier import (
    ModelSettings,
    PixelClassifier,
    check_fits,
    create_classifier,
    logits_of,
    model_folder,
    save_model,
)

__all__ = [
    "ModelSettings",
    "PixelClassifier",
    "check_fits",
    "create_classifier",
    "logits_of",
    "model_folder",
    "save_model",
]
