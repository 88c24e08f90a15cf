"""Classifiers on pixels: any timm model by name, and CIFAR's own networks."""

import robust_accel.models.cifar  # noqa: F401  (registers the CIFAR models with timm)
from robust_accel.models.classifier import PixelClassifier, logits_of, normalized
from robust_accel.models.creation import (
    ModelSettings,
    check_fits,
    check_name,
    create_classifier,
    timm_name,
)
from robust_accel.models.timm_folder import (
    beyond_timm,
    model_folder,
    read_config,
    save_model,
)

__all__ = [
    "ModelSettings",
    "PixelClassifier",
    "beyond_timm",
    "check_fits",
    "check_name",
    "create_classifier",
    "logits_of",
    "model_folder",
    "normalized",
    "read_config",
    "save_model",
    "timm_name",
]
