"""A model that is trained already, for the commands that use one."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from robust_accel.data import ImageSet
from robust_accel.models import (
    ModelSettings,
    PixelClassifier,
    check_fits,
    create_classifier,
    model_folder,
)
from robust_accel.recipe import Recipe, recipe_from_settings
from robust_accel.run_folder import RunFolder


def recipe_of(
    model: str,
    overrides: Sequence[str],
    *,
    required: Iterable[str],
    defaults: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe that a run was trained by, or a bare one for any other model.

    Args:
        model: A run folder, a timm model's name, or ``local-dir:FOLDER``.
        overrides: ``section.key=value``; ``model.checkpoint=FILE`` loads other weights than timm's.
        required: Sections that must be there.
        defaults: Settings of a model that is no run.

    Raises:
        ValueError: ``model`` is a folder, but no run.
    """
    run = RunFolder(model)
    if run.recipe.exists():
        settings: dict[str, Any] = yaml.safe_load(run.recipe.read_text())
        source = str(run.recipe)
        settings["output"] = model
    else:
        if Path(model).is_dir():
            raise ValueError(f"{model}: no recipe.yaml there; a timm folder is local-dir:{model}")
        own_weights = not any(text.startswith("model.checkpoint=") for text in overrides)
        settings = {"model": {"name": model, "pretrained": own_weights}} | (defaults or {})
        source = model
    return recipe_from_settings(settings, overrides, source, required=required)


def load_model(model: str | Path) -> PixelClassifier:
    """A trained model as RobustBench's are: a module on [0, 1] pixels, in eval mode, on the CPU.

    Args:
        model: A run folder, a timm model's name, or ``local-dir:FOLDER``.

    Raises:
        ValueError: There is no such model, or the run has not been trained to its end.
    """
    if RunFolder(model).recipe.exists():
        return _classifier_of(recipe_of(str(model), (), required=("model",)), str(model)).eval()
    return create_classifier(ModelSettings(name=str(model), pretrained=True)).eval()


def load_classifier(
    recipe: Recipe, model: str, images: ImageSet, num_classes: int
) -> PixelClassifier:
    """The trained classifier, on the CPU, in the memory format that the recipe trains it in.

    Raises:
        RecipeError: It cannot be built, or does not take such images.
    """

    def load() -> PixelClassifier:
        classifier = _classifier_of(recipe, model)
        check_fits(classifier, images, num_classes)
        if recipe.train is not None and recipe.train.channels_last:
            classifier.to(memory_format=torch.channels_last)
        return classifier

    return recipe.checked("model", load)


def _classifier_of(recipe: Recipe, model: str) -> PixelClassifier:
    settings = recipe.model
    if RunFolder(model).recipe.exists():
        # the folder holds the timm model; what is outside of that is the recipe's
        about = recipe.model.model_dump(include={"mean", "std", "size"})
        name = f"local-dir:{model_folder(model)}"
        settings = ModelSettings(name=name, pretrained=True, **about)
    return create_classifier(settings)
