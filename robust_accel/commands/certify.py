"""The certify command: certified L2 radii of a run or any timm checkpoint under Gaussian noise."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from robust_accel.commands import Found, folder_for
from robust_accel.console import is_main
from robust_accel.data import identity_of
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.certify_images import certify_images, write_table
from robust_accel.evaluation.identity import facts_of
from robust_accel.evaluation.ledger import Ledger, refresh_report
from robust_accel.processes import owned
from robust_accel.reporting.report import certified_table, write_report
from robust_accel.trained_model import load_subject, recipe_of
from robust_accel.training.peers import check_same_images, together

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> int:
    with together():
        folder, _ = certify_model(options.model, options.settings, trust=options.trust)
    if is_main():
        print("\n".join(certified_table(folder.read_report())))
        logger.info("report: %s", folder.path / "report.html")
    return 0


def certify_model(model: str, overrides: Sequence[str] = (), *, trust: bool = False) -> Found:
    """Certify test images, and write the record, the field's log and the report.

    ``certify/certify.tsv`` has a row an image in the field's columns, of the last certification;
    the ledger keeps all. An image's noise follows from (seed, image): the log does not depend on
    how many processes there were, and images that the ledger knows are not certified again.

    Args:
        model: A run folder, a timm model's name or ``local-dir:FOLDER``.
        overrides: ``section.key=value``; ``certify.sigma`` is the objective's if it has one.
        trust: Import and run classes that the run's recipe names.

    Raises:
        ValueError: Settings are out of range.
    """
    recipe = recipe_of(model, overrides, required=("model", "data", "certify"), trust=trust)
    settings = recipe.certify
    if settings.doubt:
        logger.warning(settings.doubt)
    subject = load_subject(recipe, model, settings.ids, "certify")
    for text in subject.notes:
        logger.warning(text)
    classifier, images = subject.classifier.eval(), subject.images
    folder = folder_for(model, recipe, subject, overrides, "certify")
    accelerator = Accelerator()
    recipe.checked("data", lambda: check_same_images(lambda: identity_of(test=images), accelerator))
    with owned(folder, accelerator):
        classifier.to(accelerator.device)
        bench = Bench(
            classifier,
            images,
            accelerator,
            batch_size=1,
            seed=settings.seed,
            ledger=Ledger(folder.path, accelerator, folder.absent),
            source=recipe.data.source(),
            kind=subject.selection,
        )
        record = certify_images(bench, settings.index(images), settings)
        if accelerator.is_main_process:
            write_table(folder.certify / "certify.tsv", record)
            facts = {"function": bench.function, **facts_of(classifier, Path(model).name)}
            refresh_report(folder, model=facts)
            write_report(folder)
        accelerator.wait_for_everyone()
    return Found(folder, [record])
