"""PGD accuracy against eps and against the number of steps: Figure 3 of DAT."""

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from robust_accel.attacks import PGD
from robust_accel.data import ImageSet
from robust_accel.evaluation.accuracy import accuracy, correct_flags, under_attack
from robust_accel.evaluation.settings import EvaluateSettings, PGDSettings
from robust_accel.models import PixelClassifier

Curve = list[dict[str, Any]]


def sweep(
    classifier: PixelClassifier,
    images: ImageSet,
    right: Tensor,
    settings: EvaluateSettings,
    accelerator: Accelerator,
) -> dict[str, Curve]:
    """Accuracy at each point of ``settings.sweep``.

    Args:
        right: [N], bool: the images that are right unattacked; others are not attacked.

    Returns:
        ``eps`` and ``num_steps``: points in rising order, each with its ``accuracy`` and ``n``.
    """
    assert settings.sweep is not None
    pgd = settings.pgd or PGDSettings()

    def curve(points: Iterable[float], attack_at: Any, key: str) -> Curve:
        left, found = right, []
        for point in sorted(points):
            left = correct_flags(
                classifier,
                images,
                under_attack(attack_at(point), pgd.restarts),
                settings,
                accelerator,
                num_images=len(right),
                among=left,
                title=f"{key} {point:.4g}",
            )
            found.append({key: point} | accuracy(left))
        return found

    def with_eps(eps: float) -> PGD:
        return settings.make_pgd(pgd.num_steps, eps=eps)

    def with_steps(num_steps: int) -> PGD:
        return settings.make_pgd(num_steps, pgd.step_size)

    return {
        "eps": curve(settings.sweep.eps, with_eps, "eps"),
        "num_steps": curve(settings.sweep.num_steps, with_steps, "num_steps"),
    }
