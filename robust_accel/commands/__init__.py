"""The commands: each checks what it was given and calls the parts below."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from robust_accel.console import is_main
from robust_accel.messages import printable

if TYPE_CHECKING:  # --help imports nothing
    from robust_accel.recipe import Recipe
    from robust_accel.run_folder import RunFolder
    from robust_accel.trained_model import Subject


class Found(NamedTuple):
    """What a command has measured, or found measured, and the folder that keeps it."""

    folder: "RunFolder"
    records: list[dict[str, Any]]


def say(text: str, file: TextIO | None = None) -> None:
    """Print from that process; what a stranger's file has said, too."""
    if is_main():
        print(printable(text), file=file or sys.stdout, flush=True)


def folder_for(
    model: str, recipe: "Recipe", subject: "Subject", overrides: Sequence[str], verb: str
) -> "RunFolder":
    """Where a command writes what it measures of a model.

    A run's own folder; else ``output``; else ``runs/VERB-NAME-DIGEST``, so that two models of one
    name have two folders.

    Raises:
        ValueError: The folder holds another model, or a link that leads out of it.
    """
    from robust_accel.evaluation.identity import digest_of_function
    from robust_accel.run_folder import RunFolder

    run, named = RunFolder(model), any(text.startswith("output=") for text in overrides)
    if run.recipe.exists():
        folder = RunFolder(recipe.output)
        changed = [text for text in overrides if text.startswith("model.")]
        if folder.path == run.path and changed:
            raise ValueError(
                f"output: {', '.join(changed)} makes another model than that of {model}: choose "
                "a folder for it by output=FOLDER"
            )
    elif named:
        folder = RunFolder(recipe.output)
    else:
        digest = digest_of_function(subject.classifier, subject.images.shape)
        name = f"{verb}-{Path(model).name}-{digest[:8]}"
        folder = RunFolder(Path("runs") / name)
    if folder.path.resolve() != run.path.resolve() and folder.recipe.exists():
        raise ValueError(f"output: {folder.path} holds a training run: choose another")
    folder.check_contained()
    return folder
