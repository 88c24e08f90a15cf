"""What the report says of a training: how the weights were made."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from robust_accel.attacks import FGSMPGI, FGSMRS, NFGSM
from robust_accel.data import Data
from robust_accel.evaluation.records import attack_text
from robust_accel.evaluation.settings import PGDSettings
from robust_accel.models import PixelClassifier
from robust_accel.provenance import digest_of, hardware, versions
from robust_accel.recipe import Recipe, TrainSettings
from robust_accel.training.checkpoint import Progress
from robust_accel.training.collapse import Fall, falls
from robust_accel.training.metrics import peak_memory

_HELD_OUT = "held out of train"


def facts_of_training(
    recipe: Recipe,
    data: Data,
    progress: Progress,
    classifier: PixelClassifier,
    accelerator: Accelerator,
    metrics: list[dict[str, Any]],
    *,
    steps_per_epoch: int,
) -> dict[str, Any]:
    """The report's part that no measurement changes.

    Args:
        recipe: As ``in_precision`` has made it.
        classifier: The weights that the run leaves.
        metrics: The lines of ``metrics.jsonl``.
    """
    settings = recipe.train
    assert settings is not None
    steps = max(1, progress.step)
    epochs = steps / steps_per_epoch
    exposed, gathered = progress.comm_exposed_seconds, progress.bytes_of_weights_sent
    weights = {"bytes_of_weights_sent_per_step": gathered / steps} if gathered else {}
    return {
        "recipe": recipe.settings,
        "left_out": {name: asdict(found) for name, found in data.left_out.items()},
        "doubts": [
            *doubts_of(recipe),
            *(fall.text for fall in falls_of(metrics, recipe, data)),
            *_not_come_to(settings, epochs),
        ],
        "rollbacks": progress.rollbacks,
        "steps": progress.step,
        "epochs": epochs,
        "stopped_early": progress.stopped_early,
        "skipped_steps": progress.skipped_steps,
        "num_processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "hardware": hardware(accelerator.device),
        "precision": settings.precision,
        "attack_batchnorm_mode": settings.attack_mode,
        "normalization": {
            "where": "inside the model",
            "mean": classifier.mean.flatten().tolist(),
            "std": classifier.std.flatten().tolist(),
        },
        "ema_decay": settings.ema_decay,
        "swa_start": settings.swa_start,
        "epochs_of_growing_eps": settings.grows_eps,
        "applied": progress.applied,
        "parameters_digest": digest_of(classifier.parameters()),
        "train_seconds_per_epoch": progress.train_seconds / epochs,
        "comm_seconds_per_epoch": progress.comm_seconds / epochs,
        "comm_exposed_seconds_per_epoch": None if math.isnan(exposed) else exposed / epochs,
        "bytes_sent_per_step": progress.bytes_sent / steps,
        **weights,
        "peak_memory_bytes": peak_memory(accelerator.device),
        "versions": versions(),
        **_best_against_last(metrics, progress, recipe, data),
    }


def doubts_of(recipe: Recipe) -> list[str]:
    """A training recipe's doubts, and whether catastrophic overfitting would go unseen."""
    attack: Any = recipe.attack
    named = isinstance(attack, FGSMRS | NFGSM | FGSMPGI)
    if not (named or getattr(attack, "num_steps", None) == 1) or recipe.data.validation_size:
        return recipe.doubts
    blind = (
        "a one-step attack may be overfitted (catastrophic overfitting): only held-out images show "
        "it, and there are none (data.validation_size: 0)"
    )
    return [*recipe.doubts, blind]


def _not_come_to(settings: TrainSettings, epochs: float) -> Iterator[str]:
    """What the recipe has from some epoch on, where training has ended before it."""
    ended = f"training ended at epoch {epochs:.4g}, and"
    if epochs < settings.grows_eps:
        yield f"{ended} the attack's eps would have been whole at epoch {settings.grows_eps:g}"
    awp, swa_start = settings.awp, settings.swa_start
    if awp is not None and epochs <= awp.warmup_epochs:
        yield f"{ended} no weights were perturbed: train.awp.warmup_epochs is {awp.warmup_epochs}"
    if swa_start is not None and epochs <= swa_start - 1:
        yield f"{ended} no weights were averaged: train.swa_start is {swa_start}"


def held_out_attack(recipe: Recipe) -> str:
    """What measures robust accuracy on the held-out split."""
    assert recipe.train is not None
    pgd, balls = recipe.evaluate.pgd or PGDSettings(), recipe.evaluate.balls
    about = {"name": pgd.attack, "loss": pgd.loss, "num_steps": recipe.train.validation_steps}
    several = "" if balls is None else f" in each of {len(balls)} balls"
    return attack_text(about) + several


def falls_of(metrics: list[dict[str, Any]], recipe: Recipe, data: Data) -> list[Fall]:
    """Where robust accuracy was lost, see ``collapse.py``.

    Accuracies of mixed batches, and those in a ball that is drawn, rise and fall with each step's
    draw, and tell none.
    """
    settings = recipe.train
    assert settings is not None
    drawn = recipe.data.mix is not None or getattr(recipe.attack, "strategy", None) == "random"
    if drawn and len(data.validation) == 0:
        return []
    return falls(
        metrics,
        data.num_classes,
        held_out=len(data.validation),
        after=settings.grows_eps,
    )


def _best_against_last(
    metrics: list[dict[str, Any]], progress: Progress, recipe: Recipe, data: Data
) -> dict[str, Any]:
    """Robust accuracy on the held-out split: of the best epoch, and of the last."""
    lines = [line for line in metrics if "validation_robust_accuracy" in line]
    if not lines:
        return {}
    about = {
        "split": _HELD_OUT,
        "n": len(data.validation),
        "attack": held_out_attack(recipe),
        "best": progress.best_accuracy,
        "best_epoch": progress.best_epoch,
        "last": lines[-1]["validation_robust_accuracy"],
    }
    return {"best_against_last": about}
