"""Measure a classifier: clean, PGD and AutoAttack accuracy, exact on any number of processes."""

import time
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from robust_accel.data import ImageSet
from robust_accel.evaluation.accuracy import (
    Perturb,
    accuracy,
    clean,
    correct_flags,
    predictions,
    under_attack,
)
from robust_accel.evaluation.autoattack import ATTACKS_OF, AutoAttackEvaluation
from robust_accel.evaluation.examples import keep_examples
from robust_accel.evaluation.sanity import sanity
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.evaluation.sweep import sweep
from robust_accel.models import PixelClassifier
from robust_accel.run_folder import RunFolder

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
    folder: RunFolder | None = None,
    other: PixelClassifier | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run every measurement that the settings name.

    Args:
        classifier: On [0, 1] pixels, the same weights and buffers on all processes; measured in
            eval mode and fp32.
        images: The test images.
        num_classes: Of the data, for AutoAttack's targets.
        folder: Where AutoAttack keeps the outcome of each image (what is there is not done again),
            and some adversarial images to look at.
        other: Of ``settings.sanity``: a model whose adversarial images are tried on this one.
        say: Told each result when it is there.

    Returns:
        ``clean_accuracy``, ``pgd_accuracy`` and ``autoattack_accuracy`` as
        ``{"accuracy": share, "n": images, ...}``, and the threat model: what ``report.json`` holds.
    """

    def flags_of(name: str, perturb: Perturb, limit: int | None) -> Tensor:
        return correct_flags(
            classifier, images, perturb, settings, accelerator, num_images=limit, title=name
        )

    def record(name: str, flags: Tensor, **about: Any) -> None:
        result[name] = accuracy(flags) | about
        say(f"{name}: {100 * result[name]['accuracy']:.2f}% of {len(flags)} images")

    result: dict[str, Any] = {
        "threat_model": {"norm": settings.norm, "eps": settings.eps},
        "batchnorm_mode": "eval",
        "evaluation_seed": settings.seed,
    }
    autoattack = None  # made first: what it refuses, it refuses before anything is spent
    if settings.autoattack is not None:
        autoattack = AutoAttackEvaluation(settings, num_classes)
    right = flags_of("clean_accuracy", clean, settings.images)
    record("clean_accuracy", right)
    by_pgd = by_autoattack = None
    if settings.pgd is not None:
        pgd = settings.make_pgd(settings.pgd.num_steps, settings.pgd.step_size)
        restarts = settings.pgd.restarts
        about: dict[str, Any] = {"num_steps": pgd.num_steps, "step_size": pgd.step_size}
        by_pgd = flags_of("pgd_accuracy", under_attack(pgd, restarts), settings.images)
        record("pgd_accuracy", by_pgd, **about, restarts=restarts)
    if settings.sweep is not None:
        result["sweep"] = sweep(classifier, images, right, settings, accelerator)
    if autoattack is not None:
        assert settings.autoattack is not None
        limit = min(settings.autoattack_images or len(right), len(images))
        if limit > len(right):
            right = flags_of("clean_accuracy", clean, limit)
        start = time.perf_counter()
        kept = None if folder is None else folder.autoattack
        by_autoattack = autoattack.flags(classifier, images, right[:limit], accelerator, kept)
        about = {"version": settings.autoattack, "attacks": list(ATTACKS_OF[settings.autoattack])}
        about |= {"search": settings.search, "seconds": time.perf_counter() - start}
        record("autoattack_accuracy", by_autoattack, **about)
    if settings.sanity:
        both = None
        if by_pgd is not None and by_autoattack is not None:
            number = min(len(by_pgd), len(by_autoattack))
            both = (by_pgd[:number], by_autoattack[:number])
        result["sanity"] = sanity(
            classifier, images, settings, accelerator, autoattack=both, other=other, say=say
        )
    if folder is not None:
        keep_examples(classifier, images, right, settings, accelerator, folder)
    return result
