"""What no section of a recipe can see alone: settings that do not go together in a training."""

from collections.abc import Iterator
from typing import Any

from robust_accel.attacks import remembers
from robust_accel.attacks.strength import scalable
from robust_accel.components import NotImported
from robust_accel.objectives import GradAlign

_Fault = tuple[str, str]
"""A dotted key, and: what was found, what is allowed."""
_ALIGN = "objective.grad_align"


def clashes(built: dict[str, Any]) -> Iterator[_Fault]:
    """Faults of a training.

    Args:
        built: Its components by section; None for those that are not there.
    """
    train, data = built["train"], built["data"]
    # of a class that is not imported nothing is known
    attack, objective = (
        None if isinstance(built[key], NotImported) else built[key]
        for key in ("attack", "objective")
    )
    if train is not None:
        yield from _of_train(train, data)
        yield from _of_averages(train)
        yield from _of_weight_perturbation(train)
        yield from _of_eps(train, attack)
        yield from _of_second_derivatives(train, objective)
    if attack is not None:
        yield from _of_alignment(objective, attack)
    if data is not None and objective is not None:
        yield from _of_labels(data, objective)
    if data is not None and remembers(attack):
        yield from _of_kept_images(remembers(attack), data, objective)


def _of_train(train: Any, data: Any) -> Iterator[_Fault]:
    selects = train.select == "best" or train.early_stopping is not None
    if selects and data is not None and data.validation_size == 0:
        yield (
            "data.validation_size",
            "0, but train.select: best and train.early_stopping choose on a held-out split of "
            "train: hold out some images",
        )
    if train.on_collapse != "warn" and train.select != "best":
        yield (
            "train.on_collapse",
            f"{train.on_collapse} leaves the weights from before, but train.select is "
            f"{train.select}: choose best",
        )
    if train.batch_size % train.gradient_accumulation:
        yield (
            "train.gradient_accumulation",
            f"{train.gradient_accumulation} does not divide train.batch_size {train.batch_size}",
        )


def _of_averages(train: Any) -> Iterator[_Fault]:
    if train.swa_start is None:
        return
    if train.ema_decay is not None:
        yield (
            "train.swa_start",
            f"{train.swa_start} averages epochs, and train.ema_decay {train.ema_decay:g} steps: "
            "choose one",
        )
    if train.swa_start > train.epochs:
        yield (
            "train.swa_start",
            f"{train.swa_start} is after the last of {train.epochs} epochs: nothing would be "
            "averaged",
        )


def _of_weight_perturbation(train: Any) -> Iterator[_Fault]:
    if train.awp is not None and train.awp.warmup_epochs >= train.epochs:
        yield (
            "train.awp.warmup_epochs",
            f"{train.awp.warmup_epochs} leaves none of {train.epochs} epochs: no weights would be "
            "perturbed",
        )


def _of_eps(train: Any, attack: Any) -> Iterator[_Fault]:
    key = "eps_warmup_epochs" if train.eps_schedule is None else "eps_schedule"
    if train.eps_schedule is not None and train.eps_warmup_epochs:
        yield (
            "train.eps_schedule",
            f"grows eps by steps, and train.eps_warmup_epochs {train.eps_warmup_epochs} by epochs: "
            "choose one",
        )
    if train.grows_eps > train.epochs:
        yield (
            f"train.{key}" + (".epochs" if train.eps_schedule is not None else ""),
            f"{train.grows_eps:g} is after the last of {train.epochs} epochs: eps would never be "
            "whole",
        )
    if train.grows_eps and attack is not None and not scalable(attack):
        yield f"train.{key}", f"{type(attack).__name__} has no eps that could grow"


def _of_second_derivatives(train: Any, objective: Any) -> Iterator[_Fault]:
    if not isinstance(getattr(objective, "grad_align", None), GradAlign):
        return
    if train.compile:
        yield _ALIGN, "is differentiated twice, which train.compile cannot do: choose one"
    if train.precision == "fp16":
        yield _ALIGN, "its derivatives underflow in train.precision fp16: choose bf16 or fp32"


def _of_alignment(objective: Any, attack: Any) -> Iterator[_Fault]:
    align = getattr(objective, "grad_align", None)
    if isinstance(align, GradAlign) and (why := align.misfit(attack)):
        yield f"{_ALIGN}.eps", why


def _of_labels(data: Any, objective: Any) -> Iterator[_Fault]:
    if data.mix is not None and not getattr(objective, "takes_soft_labels", False):
        yield (
            "data.mix",
            "makes labels of several classes, and this objective takes images of one: choose "
            "adversarial, trades, ikl or smoothing (a class of your own declares "
            "takes_soft_labels)",
        )


def _of_kept_images(kept: str, data: Any, objective: Any) -> Iterator[_Fault]:
    """Where an attack that keeps something of each image cannot."""
    if not data.in_memory:
        yield "attack.name", f"keeps {kept} in memory, which data.in_memory: false is to spare"
    if data.mix is not None:
        yield "attack.name", f"keeps {kept}, and data.mix makes others of them: leave one out"
    if any(own.fraction is not None for own in data.extra):
        yield (
            "attack.name",
            f"keeps {kept} of the training set, and data.unlabeled mixes in others: pool them "
            "(fraction: null), or choose another attack",
        )
    if hasattr(objective, "for_batch"):
        yield (
            "attack.name",
            f"keeps {kept}, and this objective draws noise for each batch: choose adversarial, "
            "trades or mart",
        )
