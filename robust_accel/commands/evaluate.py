"""The evaluate command: measure a run's own model, or any timm checkpoint."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from robust_accel.attacks import Attack
from robust_accel.commands import Found, folder_for
from robust_accel.console import is_main
from robust_accel.data import identity_of, load_data
from robust_accel.data.classes import match_classes
from robust_accel.evaluation import evaluate
from robust_accel.evaluation.identity import facts_of
from robust_accel.evaluation.ledger import records_in, refresh_report
from robust_accel.processes import owned
from robust_accel.recipe import Recipe
from robust_accel.reporting.report import comparison_table, write_report
from robust_accel.trained_model import load_classifier, load_subject, recipe_of
from robust_accel.training.peers import check_same_images, together

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    with together():
        folder, _ = evaluate_model(options.model, options.settings, trust=options.trust)
    if is_main():
        print(comparison_table([folder.path]))
        logger.info("report: %s", folder.path / "report.html")
    return 0


def _has_training_images(recipe: Recipe) -> bool:
    """Whether the gap to training images is meant: unasked, not beside other data than a run's."""
    by_hand = {key for key, origin in recipe.origins.items() if origin == "command line"}
    if "evaluate.train_images" in by_hand or not by_hand & {"data.path", "data.config"}:
        return True
    logger.info(
        "evaluate.train_images: left out: these are not the data that the run was trained on"
    )
    return False


def evaluate_model(
    model: str,
    overrides: Sequence[str] = (),
    *,
    attacks: Sequence[Attack] = (),
    trust: bool = False,
) -> Found:
    """Measure a model, and write the records and the report into a run folder.

    What the folder's ledger has of the same model, images and attack is not done again.

    Args:
        model: A run folder. Or a timm model's name or ``local-dir:FOLDER``, with ``data.path=...``
            and ``evaluate.eps=...`` given; then the folder is ``output``, or ``runs/evaluate-NAME``
            with the model's digest.
        overrides: ``section.key=value``.
        attacks: Beside those of the recipe.
        trust: Import and run classes that the run's recipe names.

    """
    recipe = recipe_of(model, overrides, required=("model", "data", "evaluate"), trust=trust)
    subject = load_subject(recipe, model, recipe.evaluate.ids, "evaluate")
    classifier, images = subject.classifier, subject.images
    other = train = None
    if recipe.evaluate.sanity and (source := recipe.evaluate.sanity_settings.transfer_from):
        about = recipe_of(source, (), required=("model",))
        other = load_classifier(about, source, images, subject.num_data_classes)
        if match_classes(other.class_names, classifier.class_names) is not None:
            raise ValueError(
                f"evaluate.sanity.transfer_from: {source} numbers its classes otherwise than "
                f"{model}: images made for the one say nothing of the other"
            )
    if recipe.evaluate.train_images is not None and _has_training_images(recipe):
        labeled = recipe.data.model_copy(update={"unlabeled": None})
        num_classes = recipe.model.num_classes
        data = recipe.checked("data", lambda: load_data(labeled, num_classes=num_classes))
        train = subject.of_model(data.train)
    folder = folder_for(model, recipe, subject, overrides, "evaluate")
    for text in (*subject.notes, *recipe.doubts):
        logger.warning(text)
    accelerator = Accelerator()
    recipe.checked(
        "data",
        lambda: check_same_images(lambda: identity_of(test=images, train=train), accelerator),
    )
    with owned(folder, accelerator):
        if other is not None:
            other.to(accelerator.device).eval()
        classifier.to(accelerator.device).eval()
        result = evaluate(
            classifier,
            images,
            recipe.evaluate,
            accelerator,
            num_classes=subject.num_classes,
            num_data_classes=subject.num_data_classes,
            folder=folder,
            other=other,
            train=train,
            source=recipe.data.source(),
            train_source=recipe.data.source("train"),
            kind=subject.selection,
            positions=subject.positions,
            attacks=attacks,
        )
        if accelerator.is_main_process:
            facts = {"function": result["function"], **facts_of(classifier, Path(model).name)}
            refresh_report(folder, model=facts)
            write_report(folder)
        accelerator.wait_for_everyone()
    return Found(folder, records_in(result))
