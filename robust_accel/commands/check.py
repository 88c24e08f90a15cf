"""The check command: what is wrong with a recipe, before anything is trained."""

import argparse

from robust_accel.commands import say
from robust_accel.plain_yaml import RecipeError
from robust_accel.recipe import load_recipe
from robust_accel.training.facts import doubts_of
from robust_accel.training.launcher import check_engine, launched_processes, read_launcher
from robust_accel.training.parts import batches, checks, classifier_for, in_precision, read_data
from robust_accel.training.shards import check_network, check_recipe
from robust_accel.training.stopping import is_launched


def run(options: argparse.Namespace) -> int:
    """Build the recipe, read its data, make its model; write nothing.

    Each process of a launcher does so, and then its configuration is checked as well.
    """
    recipe = load_recipe(options.recipe, options.settings)
    num_processes = _num_processes(options.processes)
    sharding, precision = read_launcher(), "no"
    launched = is_launched() or sharding is not None  # else it may be for another machine
    if launched:
        recipe, precision = in_precision(recipe)
    train = recipe.train
    assert train is not None
    data = read_data(recipe)
    parameters, faults = 0, []

    def make_model() -> None:
        nonlocal parameters
        model = recipe.checked("model", lambda: classifier_for(recipe, data))
        parameters = sum(p.numel() for p in model.parameters())
        if sharding is not None:
            check_network(model.model, sharding, precision)

    def check_launch() -> None:
        check_engine(train)
        if launched:
            check_recipe(recipe, sharding, precision)

    for check in (*checks(recipe, data, num_processes), make_model, check_launch):
        try:
            check()
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise RecipeError(*faults)
    steps = batches(recipe, data, 0, num_processes).steps_per_epoch
    size = " x ".join(map(str, data.shape))
    say(
        f"{options.recipe}: nothing is wrong. {len(data.train):,} images to train on, "
        f"{len(data.validation):,} held out, {len(data.test):,} to test, {size}, "
        f"{data.num_classes} classes; {parameters:,} parameters; {train.epochs} epochs of "
        f"{steps} steps"
    )
    for doubt in doubts_of(recipe):
        say(doubt)
    return 0


def _num_processes(asked: int | None) -> int:
    started = launched_processes()
    if is_launched() and asked not in (None, started):
        raise ValueError(f"--processes {asked}: the launcher has started {started}; leave it out")
    return asked or started
