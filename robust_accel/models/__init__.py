"""Classifiers on pixels: any timm model by name, CIFAR's own, and convolutional stems."""

import robust_accel.models.cifar
import robust_accel.models.conv_stem  # noqa: F401  (both register models with timm)
from robust_accel.models.classifier import PixelClassifier, logits_of, normalized
from robust_accel.models.creation import (
    ModelSettings,
    check_fits,
    check_name,
    create_classifier,
    timm_name,
    with_classes_of,
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
    "with_classes_of",
]
