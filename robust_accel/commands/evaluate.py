"""The evaluate command: measure a run's own model, or any timm checkpoint."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from robust_accel.commands import is_main, say
from robust_accel.data import load_test
from robust_accel.evaluation import evaluate
from robust_accel.provenance import versions
from robust_accel.reporting.report import comparison_table, write_report
from robust_accel.run_folder import RunFolder, append_line
from robust_accel.trained_model import load_classifier, recipe_of


def run(options: argparse.Namespace) -> int:
    folder = evaluate_model(options.model, options.settings)
    if is_main():
        print(comparison_table([folder.path]))
    return 0


def evaluate_model(model: str, overrides: Sequence[str] = ()) -> RunFolder:
    """Measure a model and write the result into a run folder.

    Args:
        model: A run folder; its report gets the new numbers and ``evaluations.jsonl`` keeps the
            old. Or a timm model's name or ``local-dir:FOLDER``, with ``data.path=...`` and
            ``evaluate.eps=...`` given; then the folder is ``output``, or ``runs/evaluate-NAME``.
        overrides: ``section.key=value``.

    Returns:
        The folder that holds the report.
    """
    recipe = recipe_of(
        model,
        overrides,
        required=("data", "evaluate"),
        defaults={"output": f"runs/evaluate-{Path(model).name}"},
    )
    folder = RunFolder(recipe.output)
    if folder.path != Path(model) and folder.recipe.exists():
        raise ValueError(f"output: {folder.path} holds a training run: choose another")
    images, num_classes = recipe.checked("data", lambda: load_test(recipe.data))
    classifier = load_classifier(recipe, model, images, num_classes)
    other = None
    if recipe.evaluate.sanity and (source := recipe.evaluate.sanity_settings.transfer_from):
        about = recipe_of(source, (), required=("model",))
        other = load_classifier(about, source, images, num_classes)
    accelerator = Accelerator()
    if other is not None:
        other.to(accelerator.device).eval()
    classifier.to(accelerator.device).eval()
    result = {"model": model, "data": recipe.data.model_dump(mode="json")} | evaluate(
        classifier,
        images,
        recipe.evaluate,
        accelerator,
        num_classes=num_classes,
        folder=folder,
        other=other,
        say=say,
    )
    result["num_processes"], result["versions"] = accelerator.num_processes, versions()
    if accelerator.is_main_process:
        folder.path.mkdir(parents=True, exist_ok=True)
        append_line(folder.evaluations, result)
        # how the model was trained stays as it was; what was measured now replaces what was before
        measured = {k: v for k, v in result.items() if k not in ("versions", "num_processes")}
        folder.write_report(
            folder.read_report() | measured | {"evaluated_with": result["versions"]}
        )
        write_report(folder)
    accelerator.wait_for_everyone()
    return folder
