"""The check command: what is wrong with a recipe, before anything is trained."""

import argparse

from robust_accel.commands import say
from robust_accel.plain_yaml import RecipeError
from robust_accel.recipe import load_recipe
from robust_accel.training.facts import doubts_of
from robust_accel.training.parts import batches, checks, classifier_for, read_data


def run(options: argparse.Namespace) -> int:
    """Build the recipe, read its data, make its model; write nothing."""
    recipe = load_recipe(options.recipe, options.settings)
    assert recipe.train is not None
    data = read_data(recipe)
    parameters, faults = 0, []

    def make_model() -> None:
        nonlocal parameters
        model = recipe.checked("model", lambda: classifier_for(recipe, data))
        parameters = sum(p.numel() for p in model.parameters())

    for check in (*checks(recipe, data, options.processes), make_model):
        try:
            check()
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise RecipeError(*faults)
    steps = batches(recipe, data, 0, options.processes).steps_per_epoch
    size = " x ".join(map(str, data.shape))
    say(
        f"{options.recipe}: nothing is wrong. {len(data.train):,} images to train on, "
        f"{len(data.validation):,} held out, {len(data.test):,} to test, {size}, "
        f"{data.num_classes} classes; {parameters:,} parameters; {recipe.train.epochs} epochs of "
        f"{steps} steps"
    )
    for doubt in doubts_of(recipe):
        say(doubt)
    return 0
