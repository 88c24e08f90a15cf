"""A model that is trained already, for the commands that use one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robust_accel.data import EvaluationImages, ImageSet, load_test
from robust_accel.data.classes import compared_by_number, match_classes, renumbered
from robust_accel.data.ids import Ids, IdsError
from robust_accel.messages import shown
from robust_accel.models import (
    ModelSettings,
    PixelClassifier,
    check_fits,
    check_name,
    create_classifier,
    model_folder,
    timm_name,
)
from robust_accel.plain_yaml import read_recipe
from robust_accel.recipe import Recipe, recipe_of_use
from robust_accel.run_folder import RunFolder

_OPEN = ("checkpoint", "mean", "std", "size")  # of a run's model


def recipe_of(
    model: str,
    overrides: Sequence[str],
    *,
    required: Iterable[str],
    optional: Iterable[str] = (),
    defaults: dict[str, Any] | None = None,
    trust: bool = False,
) -> Recipe:
    """What a command needs of the recipe that a run was trained by; a bare one for other models.

    Args:
        model: A run folder, a timm model's name, or a timm folder (also as ``local-dir:FOLDER``).
        overrides: ``section.key=value``; ``model.checkpoint=FILE`` loads other weights. Of a run's
            model only ``checkpoint``, ``mean``, ``std`` and ``size`` may be changed.
        required: Sections that must be there.
        optional: More sections that the command reads.
        defaults: Settings of a model that is no run.
        trust: Import and run classes that the run's recipe names, which may be a stranger's.

    Raises:
        ValueError: There is no such model, or the run has not been trained to its end.
    """
    model = _checked(model)
    run = RunFolder(model)
    is_run = run.recipe.exists()
    if is_run:
        model_folder(model)
        settings = read_recipe(run.recipe)
        source = str(run.recipe)
        settings["output"] = model
    else:
        name = _named(model)
        gets_others = any(text.startswith("model.checkpoint=") for text in overrides)
        settings = {"model": {"name": name, "pretrained": not gets_others}} | (defaults or {})
        source = model
    recipe = recipe_of_use(
        settings, overrides, source, required=required, optional=optional, trust=trust
    )
    if not is_run and gets_others and recipe.model.checkpoint is None:
        raise ValueError(
            f"command line: model.checkpoint: null is no file of weights; left out, {model} has "
            "its own"
        )
    fixed = [key for key in _overridden(recipe) if key not in _OPEN]
    if is_run and fixed:
        raise ValueError(
            f"command line: model.{fixed[0]} is not allowed: {run.model} holds the network; "
            f"allowed: {', '.join(f'model.{key}' for key in _OPEN)}"
        )
    return recipe


def load_model(model: str | Path) -> PixelClassifier:
    """A trained model as RobustBench's are: a module on [0, 1] pixels, in eval mode, on the CPU.

    Args:
        model: A run folder, a timm model's name, or a timm folder (also as ``local-dir:FOLDER``).

    Raises:
        ValueError: There is no such model, or the run has not been trained to its end.
    """
    model = _checked(str(model))
    if RunFolder(model).recipe.exists():
        return _classifier_of(recipe_of(model, (), required=("model",)), model).eval()
    return create_classifier(ModelSettings(name=_named(model), pretrained=True)).eval()


@dataclass(frozen=True)
class Subject:
    """A trained classifier, and the images that it is to be measured on.

    Attributes:
        images: Labelled by the classifier's classes.
        num_classes: Of the classifier.
        num_data_classes: Of the data.
        selection: Which images of the test split they are.
        notes: What a user should know of how the two were brought together.
        positions: The classifier's number of each class of the data, see ``match_classes``.
    """

    classifier: PixelClassifier
    images: ImageSet
    num_classes: int
    num_data_classes: int
    selection: str
    notes: tuple[str, ...]
    positions: tuple[int, ...] | None

    def of_model(self, images: ImageSet) -> ImageSet:
        """Other images of the same data, labelled by the classifier's classes."""
        return renumbered(images, self.positions)


def load_subject(recipe: Recipe, model: str, ids: Ids, section: str) -> Subject:
    """Load a trained model and the test images, and bring their classes together by name.

    Args:
        ids: Which images, see ``load_test``.
        section: Whose key ``ids`` is.

    Raises:
        RecipeError: They cannot be had, or do not go together.
    """

    def load() -> EvaluationImages:
        try:
            return load_test(recipe.data, ids=ids, num_classes=recipe.model.num_classes)
        except IdsError as error:
            error.section = section
            raise

    test = recipe.checked("data", load)
    classifier = load_classifier(recipe, model, test.images, test.num_classes)
    num_classes = getattr(classifier.model, "num_classes", test.num_classes)
    names = (test.class_names, classifier.class_names)
    about: Any = {"num_data": test.num_classes, "num_model": num_classes}
    about |= {"data": recipe.data.path, "model": model}
    positions = match_classes(*names, **about)
    note = compared_by_number(*names, **about)
    return Subject(
        classifier=classifier,
        images=renumbered(test.images, positions),
        num_classes=num_classes,
        num_data_classes=test.num_classes,
        selection=test.selection,
        notes=() if note is None else (note,),
        positions=positions,
    )


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
    settings, model = recipe.model, _checked(model)
    if RunFolder(model).recipe.exists():
        # the folder holds the timm model; what is outside of that is the recipe's
        about = recipe.model.model_dump(include={"mean", "std", "size"})
        if "checkpoint" in _overridden(recipe) and recipe.model.checkpoint is not None:
            about["checkpoint"] = recipe.model.checkpoint
        name = f"local-dir:{model_folder(model)}"
        settings = ModelSettings(name=name, pretrained="checkpoint" not in about, **about)
    classifier = create_classifier(settings, is_trained=True)
    network: Any = classifier.model
    there, here = network.pretrained_cfg.get("num_classes"), network.num_classes
    if settings.pretrained and there not in (None, here):  # timm begins a new head
        raise ValueError(f"num_classes: the weights of {settings.name} have {there}, not {here}")
    return classifier


def _overridden(recipe: Recipe) -> list[str]:
    """Keys of the model that the command line sets."""
    return [
        key.removeprefix("model.")
        for key, origin in recipe.origins.items()
        if origin == "command line" and key.startswith("model.")
    ]


def _checked(model: str) -> str:
    """The name of a model, or ValueError: nothing can have it."""
    try:
        return check_name(model)
    except ValueError as error:
        raise ValueError(f"{shown(model)}: no model: {error}") from None


def _named(model: str) -> str:
    """What timm is asked for, or ValueError: no run has this name, nor has timm."""
    try:
        return timm_name(model)
    except ValueError as error:
        raise ValueError(
            f"{model}: no model: {str(error).removeprefix('name: ')}; wanted is a run folder, a "
            "timm model's name, or a timm folder"
        ) from error
