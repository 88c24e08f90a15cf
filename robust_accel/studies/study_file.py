"""The study file: which runs, at which scale and seeds, and how their table is laid out."""

from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Len
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from robust_accel.messages import cut
from robust_accel.plain_yaml import RecipeError, read_recipe
from robust_accel.recipe_builder import built
from robust_accel.recipe_file import RECIPES
from robust_accel.settings import (
    Flag,
    Number,
    PathText,
    Settings,
    Whole,
    close_to,
    faults_of,
    listed,
)
from robust_accel.studies.measures import check_measure

FILE = "study.yaml"
PROCESSES = "processes"
_AFTER = ("certify", "evaluate", "pseudo-label")
Values = dict[str, Any]
"""Settings of a recipe, as a tree or by dotted keys."""


def _name(text: str) -> str:
    if not text or not all(c.isalnum() or c in "_-.+" for c in text):
        raise ValueError("letters, digits, _, -, + and . make a name")
    return text


def _command(words: tuple[str, ...]) -> tuple[str, ...]:
    if words[0] not in _AFTER:
        raise ValueError(f"after a training there are {listed(_AFTER)}")
    return words


Processes = Annotated[Whole, Ge(1)]


def _with_processes(values: Values) -> Values:
    if PROCESSES not in values:
        return values
    return values | {PROCESSES: TypeAdapter(Processes).validate_python(values[PROCESSES])}


Name = Annotated[str, AfterValidator(_name)]
CellValues = Annotated[Values, AfterValidator(_with_processes)]
After = Annotated[tuple[str, ...], Len(1), AfterValidator(_command)]
Measure = Annotated[str, AfterValidator(check_measure)]


class RunSettings(Settings):
    """One entry of ``runs``: what is trained, and its row.

    Args:
        recipe: A file beside the study's, a path, or a packaged recipe's name.
        label: The row's name; the entry's key when not given.
        settings: Laid over the recipe. ``{NAME}`` in a text is the folder of the study's run of
            that name, of the same seed and cell, which is then trained before.
        tune: Dotted key -> values to try. The first seed is trained by each combination, and the
            best on the held-out split of train is used for all seeds; the test images choose
            nothing.
        grid: The axes that multiply this run; all when not given.
        then: Commands after the training, each ``[certify]`` (by the recipe's section),
            ``[evaluate, SETTING, ...]`` or ``[pseudo-label, --out, "{run}/NAME.npz", ...]``;
            ``{run}`` is the run's folder.
        about: Further columns of text, in front of the measured ones.
        published: Column -> the figure that a paper has there.
        processes: Started by Accelerate's launcher where they are several.
        hidden: Trained, for others that start from it, without a row of its own.
        skip: Left out at this scale, with the claims that are about it.
    """

    recipe: PathText
    label: str | None = None
    settings: Values = Field(default_factory=dict)
    tune: dict[str, Annotated[tuple[Any, ...], Len(1)]] = Field(default_factory=dict)
    grid: tuple[str, ...] | None = None
    then: tuple[After, ...] = ()
    about: dict[str, str] = Field(default_factory=dict)
    published: dict[str, Number] = Field(default_factory=dict)
    processes: Processes = 1
    hidden: Flag = False
    skip: Flag = False


class ScaleSettings(Settings):
    """One entry of ``scales``: what is laid over every run, so that it fits a machine.

    Args:
        about: A sentence on what is scaled down.
        base: A recipe file that is laid over each run's recipe.
        settings: Laid over that; what the grid and the run itself set lies over these.
        runs: Run -> fields of ``RunSettings`` that are others at this scale; ``settings`` and
            ``tune`` are added to the run's.
        grid: Axis -> its values at this scale.
        seeds: How many, unless the command line says so.
    """

    about: str = ""
    base: PathText | None = None
    settings: Values = Field(default_factory=dict)
    runs: dict[str, Values] = Field(default_factory=dict)
    grid: dict[str, dict[str, CellValues]] = Field(default_factory=dict)
    seeds: Annotated[Whole, Ge(1)] = 3


class AxisSettings(Settings):
    """One axis of ``grid``.

    Args:
        label: Its name in tables and figures.
        values: Label -> settings that are laid over the recipe; ``processes`` among them is how
            many are started.
    """

    label: str
    values: dict[str, CellValues]


class FigureSettings(Settings):
    """Curves: a measure against an axis of the grid, or against the points of a sweep; or bars.

    Args:
        name: Of the files.
        x: An axis of the grid whose labels are numbers; or ``eps``, ``num_steps`` or ``radius``:
            the points that ``evaluate.sweep`` or ``certify`` have measured. When not given, each
            row has bars of its means, with what is published of it.
        y: Columns, where x is an axis or not given.
        runs: Those that get a curve or bars; all when not given.
        log: A logarithmic x axis.
    """

    name: Name
    title: str
    x: str | None = None
    y: tuple[str, ...] = ()
    runs: tuple[str, ...] | None = None
    log: Flag = False


class ClaimSettings(Settings):
    """A hypothesis about two runs, decided by differences within each seed.

    Args:
        text: What is claimed.
        source: Where, in a paper.
        run, than: Names of runs, or ``run, LABEL, ...`` with labels of the grid's axes; ``first``
            and ``last`` are the ends of an axis.
        columns: What is compared.
        holds_if: ``greater``: holds where the difference's whole 95% interval is above ``margin``.
            ``not_less``: where it is nowhere below ``-margin``. ``less`` and ``not_greater``
            likewise.
        margin: In units of the column.
    """

    text: str
    source: str = ""
    run: str
    than: str
    columns: Annotated[tuple[str, ...], Len(1)]
    holds_if: Literal["greater", "less", "not_less", "not_greater"] = "greater"
    margin: Annotated[Number, Ge(0)] = 0.0


def _accuracies() -> dict[str, str]:
    return {"clean (%)": "clean", "PGD (%)": "pgd"}


class StudySettings(Settings):
    """A study file.

    Args:
        title, about: Of the page; the second may be several sentences.
        studies: Folders of other studies, which this one runs, and then nothing of its own.
        runs: Name -> what is trained, in the order of the rows.
        grid: Axes that multiply the runs.
        scales: Name -> what is laid over. Without any, there is ``full``.
        columns: Column -> measure, see ``measures.py``.
        published_of: What the ``published`` figures of runs were measured on, and by whom.
        figures, claims: See there.
    """

    title: str
    about: str = ""
    studies: tuple[str, ...] = ()
    runs: dict[Name, RunSettings] = Field(default_factory=dict)
    grid: dict[Name, AxisSettings] = Field(default_factory=dict)
    scales: dict[Name, ScaleSettings] = Field(default_factory=lambda: {"full": ScaleSettings()})
    columns: dict[str, Measure] = Field(default_factory=_accuracies)
    published_of: str = ""
    figures: tuple[FigureSettings, ...] = ()
    claims: tuple[ClaimSettings, ...] = ()


def find_study(source: str) -> Path:
    """Path of a study file, given as a file, a folder with a ``study.yaml``, or a packaged name.

    Raises:
        RecipeError: There is none.
    """
    for candidate in (Path(source), RECIPES / source, RECIPES / f"{source}.yaml"):
        if (candidate / FILE).is_file():
            return candidate / FILE
        if candidate.is_file():
            return candidate
    names = listed(sorted(str(p.parent.relative_to(RECIPES)) for p in RECIPES.rglob(FILE)))
    raise RecipeError(f"{cut(source)}: no such study, nor a packaged one ({names})")


def read_study(path: Path, scale: str | None) -> tuple[StudySettings, ScaleSettings]:
    """A study file, and the scale in question, each checked in itself.

    Args:
        scale: The name; the first one when not given.

    Raises:
        RecipeError: All faults, ``file: key: what was found, what is allowed`` each.
    """
    study = _checked(StudySettings, read_recipe(path), str(path))
    faults = [*_contradictions(study)]
    scale = next(iter(study.scales)) if scale is None else scale
    if scale not in study.scales:
        close = close_to(scale, study.scales)
        faults.append(f"scales: there is no {cut(scale)!r}{close}; {listed(study.scales)} are")
    if faults:
        raise RecipeError(*(f"{path}: {fault}" for fault in faults))
    return study, study.scales[scale]


def run_at_scale(
    study: StudySettings, name: str, scale: ScaleSettings, where: str
) -> tuple[RunSettings, tuple[Values, ...]]:
    """A run's entry with what the scale changes of it; its settings, each layer over the last.

    Raises:
        RecipeError: The scale changes a field that is not there, or to what is not allowed.
    """
    run = study.runs[name].model_dump()
    changed = dict(scale.runs.get(name, {}))
    if isinstance(changed.get("tune"), dict):
        changed["tune"] = run["tune"] | changed["tune"]
    found = _checked(RunSettings, run | changed, f"{where}: runs.{name}")
    return found, (run["settings"], *([found.settings] if "settings" in changed else []))


def _checked(cls: Any, values: Values, where: str) -> Any:
    try:
        return built(cls, values)
    except ValidationError as error:
        faults = faults_of(error, cls)
    raise RecipeError(*(f"{where}: {key}: {text}".replace(": : ", ": ") for key, text in faults))


def _contradictions(study: StudySettings) -> list[str]:
    """What no section sees alone: names that are nowhere."""
    faults = []

    def known(names: Any, key: str, among: Any, kind: str) -> None:
        for name in names:
            if name not in among:
                allowed = f"{close_to(name, among)}; allowed: {listed(among) or 'none'}"
                faults.append(f"{key}: {cut(str(name))} is no {kind}{allowed}")

    if bool(study.studies) == bool(study.runs):
        faults.append("runs: a study has either runs of its own or other studies")
    for name, run in study.runs.items():
        known(run.grid or (), f"runs.{name}.grid", study.grid, "axis")
        known(run.published, f"runs.{name}.published", study.columns, "column")
        if run.published and not study.published_of:
            faults.append(f"published_of: missing: of what are those of runs.{name}.published?")
    for name, scale in study.scales.items():
        known(scale.runs, f"scales.{name}.runs", study.runs, "run")
        known(scale.grid, f"scales.{name}.grid", study.grid, "axis")
    for figure in study.figures:
        where = f"figures.{figure.name}"
        points, x = ("eps", "num_steps", "radius"), figure.x
        known([x] if x else [], f"{where}.x", [*study.grid, *points], "axis")
        known(figure.y, f"{where}.y", study.columns, "column")
        known(figure.runs or (), f"{where}.runs", study.runs, "run")
        of_sweep = x in points and x not in study.grid
        if not of_sweep and not figure.y:
            faults.append(f"{where}.y: missing: columns are wanted, but against {listed(points)}")
        if of_sweep and figure.y:
            faults.append(f"{where}.y: against {x} accuracy is drawn: leave it out")
        if x is None and figure.log:
            faults.append(f"{where}.log: bars have no x axis: leave it out, or give x")
    for number, claim in enumerate(study.claims):
        sides = [side.split(",")[0].strip() for side in (claim.run, claim.than)]
        known(sides, f"claims.{number}", study.runs, "run")
        known(claim.columns, f"claims.{number}.columns", study.columns, "column")
    return faults
