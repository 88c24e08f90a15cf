"""The train command: a recipe becomes a run folder."""

import argparse

from robust_accel.commands import is_main
from robust_accel.recipe import load_recipe
from robust_accel.reporting.report import comparison_table
from robust_accel.training.run import train
from robust_accel.training.stopping import is_restarted


def run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.settings)
    # what torchrun starts again after a failure is the run that it has started before
    train(recipe, resume=options.resume or is_restarted(), quiet=options.quiet)
    if is_main():
        print(comparison_table([recipe.output]))
    return 0
