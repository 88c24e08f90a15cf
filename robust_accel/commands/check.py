"""The check command: what is wrong with a recipe, before anything is trained."""

import argparse
from collections.abc import Callable
from typing import Any

from robust_accel.commands import say
from robust_accel.data import load_data
from robust_accel.plain_yaml import RecipeError
from robust_accel.recipe import load_recipe
from robust_accel.training.parts import batches, check_labels, classifier_for


def run(options: argparse.Namespace) -> int:
    """Build the recipe, read its data, make its model; write nothing."""
    recipe = load_recipe(options.recipe, options.settings)
    assert recipe.train is not None
    seed, ids, number = recipe.train.seed, recipe.evaluate.ids, recipe.model.num_classes
    data = recipe.checked(
        "data", lambda: load_data(recipe.data, seed=seed, ids=ids, num_classes=number)
    )
    made: dict[str, Any] = {}
    faults: list[str] = []
    parts: dict[str, Callable[[], Any]] = {
        "train": lambda: batches(recipe, data, 0, 1),
        "data": lambda: check_labels(recipe, data),
        "model": lambda: classifier_for(recipe, data),
    }
    for section, part in parts.items():
        try:
            made[section] = recipe.checked(section, part)
        except RecipeError as error:
            faults.append(str(error))
    if faults:
        raise RecipeError(*faults)
    parameters = sum(p.numel() for p in made["model"].parameters())
    steps = made["train"].steps_per_epoch
    size = " x ".join(map(str, data.shape))
    say(
        f"{options.recipe}: nothing is wrong. {len(data.train):,} images to train on, "
        f"{len(data.validation):,} held out, {len(data.test):,} to test, {size}, "
        f"{data.num_classes} classes; {parameters:,} parameters; {recipe.train.epochs} epochs of "
        f"{steps} steps"
    )
    for doubt in recipe.doubts:
        say(doubt)
    return 0
