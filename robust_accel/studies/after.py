"""Commands that follow a training of a study: what they may be, and what they leave."""

from collections.abc import Iterator
from pathlib import Path

from robust_accel.data import LABELED_FILES
from robust_accel.messages import cut, is_setting
from robust_accel.plain_yaml import RecipeError
from robust_accel.recipe import recipe_of_use
from robust_accel.settings import listed
from robust_accel.studies.trial import Command, Trial

RUN = "{run}"
"""The run's own folder, in a study file."""
_READS = {
    "certify": ("model", "data", "certify"),
    "evaluate": ("model", "data", "evaluate"),
    "pseudo-label": ("model", "data"),
}
"""Command -> sections that must be there."""
_FLAGS = {"pseudo-label": ("--data", "--out")}
_TRUST = "--trust"  # of the others


def check_after(trial: Trial, where: str) -> None:
    """That what follows a training can be done, as far as it can be known before.

    Args:
        where: Of the run in the study file.

    Raises:
        RecipeError: A word or a setting is not allowed: all faults.
    """
    faults = [f"{where}.then: {c[0]}: {fault}" for c in trial.then for fault in _faults(trial, c)]
    if faults:
        raise RecipeError(*faults)


def _faults(trial: Trial, command: Command) -> Iterator[str]:
    name, *words = command
    flags, rest, settings = _FLAGS.get(name, ()), iter(words), []
    given: dict[str, str | None] = {}
    for word in rest:
        if word in flags:
            given[word] = next(rest, None)
        elif word == _TRUST and name not in _FLAGS:
            continue
        elif is_setting(word):
            settings.append(word.replace(RUN, str(trial.folder)))
        else:
            allowed = listed([*(flags or (_TRUST,)), "section.key=value"])
            yield f"{cut(word)} is not allowed; allowed: {allowed}"
    for key in (setting.partition("=")[0] for setting in settings):
        if name == key.partition(".")[0] == "certify":
            yield f"{key}: the table shows the certificate of the run's recipe: set it in settings"
    yield from (f"{flag}: a value is wanted" for flag, value in given.items() if value is None)
    out = given.get("--out") or ""
    if name == "pseudo-label" and not (out.startswith(f"{RUN}/") and out.endswith(LABELED_FILES)):
        # seeds and cells must not write one file
        wanted = " or ".join(f"{RUN}/NAME{suffix}" for suffix in LABELED_FILES)
        yield f"--out: {cut(out) or 'missing'}: {wanted} is wanted"
    try:
        optional = ("evaluate",) if name == "pseudo-label" else ()
        recipe_of_use(trial.recipe.settings, settings, "run", required=_READS[name],
                      optional=optional, trust=_TRUST in words)  # fmt: skip
    except RecipeError as error:
        yield from (line.partition(": ")[2] for line in str(error).splitlines())


def left_behind(trial: Trial, command: Command) -> Path | None:
    """What a command writes into its run's own folder, where an earlier one may have left it."""
    if "--out" not in command:
        return None
    return trial.folder / command[command.index("--out") + 1].removeprefix(f"{RUN}/")
