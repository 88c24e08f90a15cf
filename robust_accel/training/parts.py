"""What a run is made of, from its recipe and data."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from accelerate import Accelerator

from robust_accel.attacks import remembers
from robust_accel.data import Data, Mixing, TrainingBatches, load_data
from robust_accel.evaluation import evaluate
from robust_accel.evaluation.accuracy import check_loss
from robust_accel.evaluation.autoattack import check_classes
from robust_accel.evaluation.corruptions import CorruptionEvaluation
from robust_accel.models import PixelClassifier, check_fits, create_classifier, with_classes_of
from robust_accel.plain_yaml import RecipeError
from robust_accel.recipe import Recipe
from robust_accel.recipe_checks import clashes
from robust_accel.recipe_file import origin_of
from robust_accel.run_folder import RunFolder
from robust_accel.training.accelerator import choose_precision
from robust_accel.training.launcher import as_launched
from robust_accel.training.start import Start, check_same_data


def in_precision(recipe: Recipe) -> tuple[Recipe, str]:
    """The recipe with what its ``train.precision`` comes to, by the launcher and the device.

    Returns:
        It, and Accelerate's ``mixed_precision``.

    Raises:
        RecipeError: There is no such precision here, or it does not go with the rest.
    """
    train = recipe.train
    assert train is not None
    precision = recipe.checked("train", lambda: choose_precision(as_launched(train.precision)))
    update = {"precision": "fp32" if precision == "no" else precision}
    recipe = replace(recipe, train=train.model_copy(update=update))
    faults = [
        f"{origin_of(recipe.origins, key)}: {key}: {why}" for key, why in clashes(vars(recipe))
    ]
    if faults:
        raise RecipeError("\n".join(faults))
    return recipe, precision


def checked_data(
    recipe: Recipe, start: Start, accelerator: Accelerator
) -> tuple[Data, dict[str, Any]]:
    """The images, and what a checkpoint says of them; or what is wrong with them."""
    data = read_data(recipe)
    identity = data.identity()
    recipe.checked("data", lambda: check_same_data(start, identity, data.test, accelerator))
    for check in checks(recipe, data, accelerator.num_processes):
        check()
    return data, {"data": identity}


def read_data(recipe: Recipe) -> Data:
    """The images that a recipe is about."""
    assert recipe.train is not None
    seed, ids, number = recipe.train.seed, recipe.evaluate.ids, recipe.model.num_classes
    return recipe.checked(
        "data", lambda: load_data(recipe.data, seed=seed, ids=ids, num_classes=number)
    )


def checks(recipe: Recipe, data: Data, num_processes: int) -> list[Callable[[], object]]:
    """What each raises a ValueError where the recipe does not go with its images."""
    number = number_of_logits(recipe, data)
    found: list[Callable[[], object]] = [
        lambda: recipe.checked("train", lambda: batches(recipe, data, 0, num_processes)),
        lambda: recipe.checked("data", lambda: check_labels(recipe, data)),
        lambda: check_loss("objective.attack_loss", recipe.objective, number),
        lambda: check_loss("evaluate.pgd.loss", recipe.evaluate.pgd, number),
        lambda: check_classes(recipe.evaluate.autoattack, number),
        lambda: recipe.checked("evaluate", lambda: check_transfer(recipe)),
        lambda: recipe.checked("data", lambda: check_kept_images(recipe, num_processes)),
    ]
    if recipe.evaluate.corruptions:
        about: Any = {"num_classes": data.num_classes, "class_names": data.class_names}
        about |= {"source": recipe.data.source()}
        found.append(lambda: CorruptionEvaluation(recipe.evaluate, data.test, **about))
    return found


def check_transfer(recipe: Recipe) -> None:
    """Refuse another model's images: a training measures its own model alone."""
    source = recipe.evaluate.sanity_settings.transfer_from
    if source is not None:
        raise ValueError(
            f"sanity.transfer_from: {source} is for robust-accel evaluate, on the run that this "
            "makes: leave it out here"
        )


def check_kept_images(recipe: Recipe, num_processes: int) -> None:
    """Refuse to deal images anew to processes that each keep something of their own ones."""
    kept = remembers(recipe.attack)
    if kept and num_processes > 1 and recipe.data.sharding != "fixed":
        raise ValueError(
            f"sharding: {recipe.data.sharding} deals images to other processes in each epoch, and "
            f"attack.name {recipe.settings['attack']['name']} keeps {kept} where it was: choose "
            "fixed"
        )


def batches(recipe: Recipe, data: Data, rank: int, world_size: int) -> TrainingBatches:
    """A process's share of the training images, in their order."""
    assert recipe.train is not None
    return TrainingBatches(
        data,
        fraction=[own.fraction for own in recipe.data.extra if own.fraction is not None],
        batch_size=recipe.train.batch_size,
        num_micro=recipe.train.gradient_accumulation,
        rank=rank,
        world_size=world_size,
        seed=recipe.train.seed,
        sharding=recipe.data.sharding,
        mixing=_mixing(recipe, data),
    )


def _mixing(recipe: Recipe, data: Data) -> Mixing | None:
    """``data.mix``, for as many classes as the model has."""
    assert recipe.train is not None
    if recipe.data.mix is None:
        return None
    return Mixing(recipe.data.mix, number_of_logits(recipe, data), recipe.train.seed)


def number_of_logits(recipe: Recipe, data: Data) -> int:
    """The classes that the model has, which may be more than the data's."""
    model = recipe.model
    return int(model.options.get("num_classes") or model.num_classes or data.num_classes)


def measure(
    recipe: Recipe,
    data: Data,
    classifier: PixelClassifier,
    folder: RunFolder,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """What ``evaluate`` finds of a run's classifier on the run's images."""
    return evaluate(
        classifier,
        data.test,
        recipe.evaluate,
        accelerator,
        num_classes=number_of_logits(recipe, data),
        num_data_classes=data.num_classes,
        folder=folder,
        train=data.train,
        source=recipe.data.source(),
        train_source=recipe.data.source("train"),
        kind=data.selection,
    )


def check_labels(recipe: Recipe, data: Data) -> None:
    """Refuse unlabelled images where the objective, or mixing, needs labels."""
    if recipe.data.mix is not None and not data.all_labeled:
        raise ValueError(
            "mix: it mixes labels, too, and some of these images have no labels: make some by the "
            "pseudo-label command, or leave data.mix out"
        )
    if not data.all_labeled and not getattr(recipe.objective, "takes_unlabeled", False):
        raise ValueError(
            f"unlabeled: these images have no labels, and the objective "
            f"{recipe.settings['objective']['name']} needs them: label them by the pseudo-label "
            "command, or choose trades"
        )


def classifier_for(recipe: Recipe, data: Data) -> PixelClassifier:
    """The recipe's model for these images and classes."""
    classifier = create_classifier(
        recipe.model, num_classes=data.num_classes, in_chans=data.shape[0]
    )
    check_fits(classifier, data.train, data.num_classes)
    with_classes_of(classifier, data.class_names)
    return classifier
