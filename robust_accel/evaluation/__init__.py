"""Measure a classifier: clean, PGD and AutoAttack accuracy, exact on any number of processes."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from robust_accel.data import ImageSet
from robust_accel.evaluation.accuracy import (
    Perturb,
    accuracy,
    clean,
    correct_flags,
    predictions,
    under_attack,
)
from robust_accel.evaluation.autoattack import ATTACKS_OF, AutoAttackUnit
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.models import PixelClassifier

__all__ = [
    "EvaluateSettings",
    "accuracy",
    "clean",
    "correct_flags",
    "evaluate",
    "predictions",
    "under_attack",
]


def evaluate(
    classifier: PixelClassifier,
    images: ImageSet,
    settings: EvaluateSettings,
    accelerator: Accelerator,
    *,
    num_classes: int,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run every measurement that the settings name.

    Args:
        classifier: On [0, 1] pixels, the same weights and buffers on all processes; measured in
            eval mode and fp32.
        images: The test images.
        num_classes: Of the data, for AutoAttack's targets.
        say: Told each result when it is there.

    Returns:
        ``clean_accuracy``, ``pgd_accuracy`` and ``autoattack_accuracy`` as
        ``{"accuracy": share, "n": images, ...}``, and the threat model: what ``report.json`` holds.
    """

    def measure(name: str, perturb: Perturb, limit: int | None, **about: Any) -> None:
        flags = correct_flags(
            classifier, images, perturb, settings, accelerator, num_images=limit, title=name
        )
        result[name] = accuracy(flags) | about
        say(f"{name}: {100 * result[name]['accuracy']:.2f}% of {len(flags)} images")

    result: dict[str, Any] = {
        "threat_model": {"norm": settings.norm, "eps": settings.eps},
        "batchnorm_mode": "eval",
        "evaluation_seed": settings.seed,
    }
    autoattack = None  # made first: what it refuses, it refuses before anything is spent
    if settings.autoattack is not None:
        autoattack = AutoAttackUnit(settings, num_classes, accelerator.device)
    measure("clean_accuracy", clean, settings.images)
    if settings.pgd is not None:
        pgd = settings.make_pgd(settings.pgd.num_steps, settings.pgd.step_size)
        about: dict[str, Any] = {"num_steps": pgd.num_steps, "step_size": pgd.step_size}
        measure("pgd_accuracy", under_attack(pgd), settings.images, **about)
    if autoattack is not None:
        assert settings.autoattack is not None
        limit = settings.autoattack_images or settings.images
        about = {"version": settings.autoattack, "attacks": list(ATTACKS_OF[settings.autoattack])}
        measure("autoattack_accuracy", autoattack, limit, **about)
    return result
