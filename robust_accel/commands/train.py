"""The train command: a recipe becomes a run folder."""

import argparse
import logging
import shlex

from robust_accel.console import is_main
from robust_accel.models.timm_folder import read_config
from robust_accel.recipe import load_recipe
from robust_accel.recipe_file import packaged_recipes
from robust_accel.reporting.report import comparison_table
from robust_accel.run_folder import RunFolder
from robust_accel.training.run import train
from robust_accel.training.stopping import is_restarted

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    source, settings = options.recipe, options.settings
    own = RunFolder(source)
    if source not in packaged_recipes() and own.recipe.is_file():  # a run goes on where it lies
        source, settings = str(own.recipe), [f"output={source}", *settings]
    recipe = load_recipe(source, settings)
    # what torchrun starts again after a failure is the run that it has started before
    train(recipe, resume=options.resume or is_restarted())
    if is_main():
        print(comparison_table([recipe.output]))
        folder = RunFolder(recipe.output)
        logger.info("report: %s", folder.path / "report.html")
        logger.info("model and its card: %s", folder.model)
        classes = read_config(folder.model).get("num_classes", 0)
        if recipe.evaluate.autoattack != "standard" and classes > 3:  # which it needs
            said = shlex.join(["evaluate", str(folder.path), "evaluate.autoattack=standard"])
            logger.info("for a number to publish: robust-accel %s", said)
    return 0
