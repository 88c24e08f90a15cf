"""The certify command: certified L2 radii of a run or any timm checkpoint under Gaussian noise."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from robust_accel.commands import is_main
from robust_accel.data import load_test
from robust_accel.evaluation.certify_images import CertifyLog, certify_images, summary
from robust_accel.reporting.report import certified_table, write_report
from robust_accel.run_folder import RunFolder
from robust_accel.trained_model import load_classifier, recipe_of


def run(options: argparse.Namespace) -> int:
    folder = certify_model(options.model, options.settings)
    if is_main():
        print("\n".join(certified_table(folder.read_report())))
    return 0


def certify_model(model: str, overrides: Sequence[str] = ()) -> RunFolder:
    """Certify test images, and write the log, ``report.json`` and ``report.md``.

    ``certify/certify.tsv`` has a row an image in the field's columns; ``certify/process-*.jsonl``
    hold the same as it comes, with the samples that each image took, so that a killed run goes on.
    An image's noise follows from (seed, image): the log does not depend on how many processes
    there were.

    Args:
        model: A run folder, a timm model's name or ``local-dir:FOLDER``.
        overrides: ``section.key=value``; ``certify.sigma`` is the objective's if it has one.

    Raises:
        ValueError: Settings are out of range, or the folder's log is of another model, sigma, seed
            or number of samples: it is left as it was.
    """
    recipe = recipe_of(
        model,
        overrides,
        required=("model", "data", "certify"),
        defaults={"output": f"runs/certify-{Path(model).name}"},
    )
    settings, folder = recipe.certify, RunFolder(recipe.output)
    images, num_classes = recipe.checked("data", lambda: load_test(recipe.data))
    indices = list(range(0, len(images), settings.skip))[: settings.images]
    classifier = load_classifier(recipe, model, images, num_classes).eval()
    log = CertifyLog(folder.certify, settings, classifier, images)
    accelerator = Accelerator()
    classifier.to(accelerator.device)
    rows = log.rows(accelerator)
    certify_images(classifier, images, indices, settings, accelerator, log, rows)
    rows = log.rows(accelerator)
    if accelerator.is_main_process:
        log.write_table([rows[i] for i in indices])
        report = folder.read_report()
        report["certified"] = summary(settings, [rows[i] for i in indices])
        folder.write_report(report)
        write_report(folder)
    accelerator.wait_for_everyone()
    return folder
