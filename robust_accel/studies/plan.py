"""What a study trains: its runs times the grid's cells, the settings tried, and the seeds.

A training is known by the digest of its settings. Its folder bears the digest, so that two studies
that ask for the same training share it, and a changed recipe is another training: no number of the
old one is taken for it.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from robust_accel.messages import close_to, cut
from robust_accel.plain_yaml import RecipeError, number
from robust_accel.recipe import load_recipe
from robust_accel.recipe_file import beside, laid_over
from robust_accel.settings import listed
from robust_accel.studies.after import check_after
from robust_accel.studies.measures import is_asked
from robust_accel.studies.study_file import (
    PROCESSES,
    RunSettings,
    ScaleSettings,
    StudySettings,
    Values,
    run_at_scale,
)
from robust_accel.studies.trial import Cell, Trial, digest_of, flat, slug

MOST_TRAININGS = 10_000
_OWN = {"output", "train.seed", "communication.seed"}  # settings of each training that differ
_ENDS = {"first": 0, "last": -1}


Chosen = Callable[[Cell], tuple[tuple[str, Any], ...] | None]
"""The settings that a cell was tuned to; None while that is not known."""


class Plan:
    """The trainings of a study at a scale.

    Args:
        path: Of the study file.
        root: The folder of all runs.
        overrides: ``key.subkey=value`` for every run.
        seeds: The numbers; the first is also the one that settings are tuned by.
        launcher: What starts the trainings, see ``Runner``.

    Raises:
        RecipeError: One of the recipes cannot run: all faults; or there are too many.
    """

    def __init__(
        self,
        path: Path,
        study: StudySettings,
        scale: ScaleSettings,
        root: Path,
        *,
        overrides: Sequence[str] = (),
        seeds: Sequence[int] = (0, 1, 2),
        launcher: str | None = None,
    ) -> None:
        self.path, self.study, self.scale, self.root = path, study, scale, root
        self.overrides, self.seeds, self.launcher = tuple(overrides), seeds, launcher
        runs = {name: run_at_scale(study, name, scale, str(path)) for name in study.runs}
        self.runs = {name: run for name, (run, _) in runs.items() if not run.skip}
        self._settings = {name: settings for name, (_, settings) in runs.items()}
        self.axes = {name: scale.grid.get(name, axis.values) for name, axis in study.grid.items()}
        if self.number > MOST_TRAININGS:
            said = f"{self.number:,} trainings; a study has at most {MOST_TRAININGS:,}"
            raise RecipeError(f"{path}: {said}: fewer seeds, values to try or labels of the grid")
        self.cells = [cell for name in self.runs for cell in self._cells_of(name)]
        self._known: dict[Any, Trial] = {}
        self._attempts: dict[Trial, Trial] = {}
        self._check()

    def _cells_of(self, name: str) -> Iterator[Cell]:
        axes = self._axes_of(name)
        for labels in itertools.product(*(self.axes[axis] for axis in axes)):
            yield Cell(name, tuple(zip(axes, labels, strict=True)))

    def _axes_of(self, name: str) -> list[str]:
        own = self.runs[name].grid
        return [axis for axis in self.axes if own is None or axis in own]

    def cell(self, text: str) -> Cell:
        """The row that a claim names: ``run``, or ``run, LABEL, ...`` with ``first`` and ``last``.

        Raises:
            RecipeError: None, or more than one.
        """
        name, labels = run_of(text), [part.strip() for part in text.split(",")][1:]
        found = []
        for cell in self._cells_of(name):
            own = set()
            for axis, label in cell.labels:
                values = list(self.axes[axis])
                own |= {label} | {word for word, end in _ENDS.items() if values[end] == label}
            if own.issuperset(labels):
                found.append(cell)
        if len(found) != 1:
            several = "; ".join(cell.name for cell in found) or "none"
            raise RecipeError(f"{self.path}: claims: {text!r} must name one row, got {several}")
        return found[0]

    def tries(self, cell: Cell) -> list[tuple[tuple[str, Any], ...]]:
        """Combinations of the settings that a cell is tuned by; one empty one if it is not."""
        tune = self.runs[cell.run].tune
        return [tuple(zip(tune, found, strict=True)) for found in itertools.product(*tune.values())]

    @property
    def number(self) -> int:
        """Of all trainings."""
        number = 0
        for name, run in self.runs.items():
            cells = math.prod(len(self.axes[axis]) for axis in self._axes_of(name))
            number += cells * (math.prod(map(len, run.tune.values())) + len(self.seeds) - 1)
        return number

    @property
    def passes(self) -> float:
        """Of all trainings, see ``Trial.passes``; what is tuned counts as its first."""
        total, first, seed = 0.0, lambda cell: self.tries(cell)[0], self.seeds[0]
        for cell in self.cells:
            tries = self.tries(cell)
            found = [self.trial(cell, tried, seed, first) for tried in tries]
            each = [trial.passes for trial in found if trial is not None]
            total += sum(each) + (len(self.seeds) - 1) * each[0]
        return total

    def known(self, chosen: Chosen) -> list[Trial]:
        """The trainings that can be named yet: seeds but the first wait for the tuning.

        Two of one folder are one training, of which each has its own measured.

        Args:
            chosen: Asked of cells that are tuned.
        """
        found: list[Trial | None] = []
        for seed in self.seeds:
            for cell in self.cells:
                tries = self.tries(cell)
                best = tries[0] if len(tries) == 1 else chosen(cell)
                if seed != self.seeds[0]:
                    tries = [] if best is None else [best]
                for tried in tries:
                    found.append(
                        self.trial(cell, tried, seed, chosen)
                        if tried == best
                        else self.attempt(cell, tried, chosen)
                    )
        return [trial for trial in found if trial is not None]

    def attempt(
        self, cell: Cell, tried: tuple[tuple[str, Any], ...], chosen: Chosen
    ) -> Trial | None:
        """A training to tune by, as ``trial``, and nothing that follows it."""
        trial = self.trial(cell, tried, self.seeds[0], chosen)
        return trial and self._attempts.setdefault(trial, replace(trial, then=()))

    def trial(
        self,
        cell: Cell,
        tried: tuple[tuple[str, Any], ...],
        seed: int,
        chosen: Chosen,
        _above: tuple[Cell, ...] = (),
    ) -> Trial | None:
        """A training by its place; None while what it starts from is not known."""
        run = self.runs[cell.run]
        needed: dict[str, Trial] = {}
        for name in self._references(run, cell):
            source = self._source(cell, name)
            if source in (*_above, cell):
                raise RecipeError(f"{self.path}: runs.{cell.run}: {{{name}}} starts from itself")
            tries = self.tries(source)
            best = tries[0] if len(tries) == 1 else chosen(source)
            above = (*_above, cell)
            origin = None if best is None else self.trial(source, best, seed, chosen, above)
            if origin is None:
                return None
            needed[name] = origin
        key = (cell, json.dumps(tried), seed, *(origin.folder for origin in needed.values()))
        if key not in self._known:
            self._known[key] = self._made(cell, tried, seed, needed)
        return self._known[key]

    def _made(
        self, cell: Cell, tried: tuple[tuple[str, Any], ...], seed: int, needed: dict[str, Trial]
    ) -> Trial:
        run, where = self.runs[cell.run], f"{self.path}: runs.{cell.run}"
        axes = {f"{axis}.{label}": dict(self.axes[axis][label]) for axis, label in cell.labels}
        processes = [axis.pop(PROCESSES) for axis in axes.values() if PROCESSES in axis]
        (processes,) = processes[-1:] or [run.processes]
        folders = {name: str(trial.folder) for name, trial in needed.items()}
        settings: list[tuple[str, Values]] = [
            (f"{self.path}: scales", self.scale.settings),
            *((f"{self.path}: grid.{axis}", values) for axis, values in axes.items()),
            *((where, values) for values in self._settings[cell.run]),
            (f"{where}.tune", dict(tried)),
            ("the study's seed", {"train.seed": seed}),
        ]
        trees: list[Any] = [(origin, _tree(origin, tree, folders)) for origin, tree in settings]
        if self.scale.base is not None:
            trees.insert(0, beside(self.path, self.scale.base, "base"))
        source = beside(self.path, run.recipe, f"runs.{cell.run}.recipe")
        recipe = load_recipe(source, self.overrides, layers=trees)
        if "seed" in recipe.settings["communication"]:  # other rounding with each seed
            seeded = [*self.overrides, f"communication.seed={seed}"]
            recipe = load_recipe(source, seeded, layers=trees)
        digest = digest_of(recipe.chosen, processes, self.launcher, needed)
        then = tuple(
            tuple(_filled(word, folders | {"run": None}) for word in command)
            for command in run.then
        )
        needs = tuple(trial.folder for trial in needed.values())
        folder = self.root / f"{slug(recipe)}-{digest}"
        return Trial(cell, tried, seed, recipe, digest, folder, processes, then, needs)

    def _references(self, run: RunSettings, cell: Cell) -> list[str]:
        axes = [self.axes[axis][label] for axis, label in cell.labels]
        own = self._settings[cell.run]
        texts = json.dumps([own, self.scale.settings, axes, run.then], ensure_ascii=False)
        names = dict.fromkeys(re.findall(r"\{(\w[\w.+-]*)\}", texts))
        return [name for name in names if name != "run"]

    def _source(self, cell: Cell, name: str) -> Cell:
        """The cell of another run with the same labels."""
        if name not in self.runs:
            raise RecipeError(
                f"{self.path}: runs.{cell.run}: {{{cut(name)}}} is no run"
                f"{close_to(name, self.runs)}; allowed: {listed(self.runs)}"
            )
        labels = dict(cell.labels)
        for source in self._cells_of(name):
            if all(labels.get(axis) == label for axis, label in source.labels):
                return source
        raise RecipeError(f"{self.path}: runs.{cell.run}: {name} has no cell like {cell.name}")

    def _contradictions(self) -> Iterator[str]:
        """What would make rows or seeds equal that are told apart, or not be followed."""
        given: list[tuple[str, Values]] = [("scales", self.scale.settings)]
        varied = set(_OWN)
        for name, run in self.runs.items():
            given += [(f"runs.{name}", values) for values in self._settings[name]]
            given.append((f"runs.{name}.tune", run.tune))
            varied |= set(run.tune)
        for axis, values in self.axes.items():
            for settings in values.values():
                given.append((f"grid.{axis}", settings))
                varied |= set(flat(_tree("", settings, {})))
        for override in self.overrides:
            key = override.partition("=")[0]
            for name in sorted(varied):
                if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}."):
                    yield f"command line: {cut(key)}: the study itself varies {name}"
        for place, settings in given:
            for key in sorted(_OWN.intersection(flat(settings))):
                yield f"{self.path}: {place}: {key}: the study itself varies it: leave it out"
        for figure in self.study.figures:
            for label in self.axes.get(figure.x or "", ()):
                if number(label) is None:
                    where = f"{self.path}: figures.{figure.name}"
                    yield f"{where}: {label!r} of {figure.x} is no number"

    def _never_filled(self) -> Iterator[str]:
        """Columns that were asked for, and that no row's commands measure."""
        if "columns" not in self.study.model_fields_set:
            return
        rows = [t for t in self._known.values() if not self.runs[t.cell.run].hidden]
        for column, name in self.study.columns.items():
            if rows and not any(is_asked(name, t.recipe, [c[0] for c in t.then]) for t in rows):
                yield f"{self.path}: columns.{column}: {name}: no run of this study measures it"

    def _check(self) -> None:
        """Build every recipe, as far as it can be known before anything has run."""
        faults: dict[str, None] = {}
        rows: dict[Any, Cell] = {}
        for cell in self.cells:
            tries = self.tries(cell)
            for tried in tries:
                try:
                    trial = self.trial(cell, tried, self.seeds[0], lambda c: self.tries(c)[0])
                    assert trial is not None
                    check_after(trial, f"{self.path}: runs.{cell.run}")
                    trial.check_lists()
                except RecipeError as error:
                    faults |= dict.fromkeys(str(error).splitlines())
                    continue
                where = f"{self.path}: runs.{cell.run}"
                if not self.runs[cell.run].hidden:
                    alike = rows.setdefault((trial.digest, *trial.commands), cell)
                    if alike is not cell:
                        faults[f"{where}: {cell.name} is the very training of {alike.name}"] = None
                for fault in _faults(trial, is_tuned=len(tries) > 1):
                    faults[f"{where}{fault}"] = None
        faults |= dict.fromkeys([*self._contradictions(), *self._never_filled()])
        for claim in self.study.claims:
            for side in (claim.run, claim.than):
                if run_of(side) in self.runs:
                    self.cell(side)
        if faults:
            raise RecipeError(*faults)


def _faults(trial: Trial, *, is_tuned: bool) -> Iterator[str]:
    train = trial.recipe.train
    assert train is not None
    if is_tuned and trial.recipe.data.validation_size == 0:
        why = "settings are tuned on a split held out of train"
        yield f".tune: {why}, but data.validation_size is 0"
    if train.batch_size % (trial.processes * train.gradient_accumulation):
        parts = f"{trial.processes} processes x {train.gradient_accumulation} micro-batches"
        yield f": train.batch_size: {train.batch_size} is not divisible by {parts}"


def run_of(text: str) -> str:
    """The run in what a claim names."""
    return text.split(",")[0].strip()


def _tree(where: str, values: Values, folders: Mapping[str, str]) -> Values:
    """Settings with dotted keys as a tree, and with the folders that they name."""
    tree: Values = {}
    for dotted, value in values.items():
        *above, last = str(dotted).split(".")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise RecipeError(f"{where}: {dotted}: {key} is set to a value there, too")
        node[last] = laid_over(node.get(last), _filled(value, folders))
    return tree


def _filled(value: Any, folders: Mapping[str, str | None]) -> Any:
    """A value in which ``{NAME}`` is that run's folder; None leaves it for later."""
    if isinstance(value, dict):
        return {key: _filled(inner, folders) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_filled(inner, folders) for inner in value)
    if isinstance(value, str):
        for name, folder in folders.items():
            value = value if folder is None else value.replace(f"{{{name}}}", folder)
    return value
