"""What a study has found: numbers of trainings, what was tuned, rows, and what claims come to."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev

from robust_accel.reporting.views import Run, read_runs
from robust_accel.statistics import Interval, paired_difference, t_interval
from robust_accel.studies.execution import Done
from robust_accel.studies.measures import curve, held_out, measure
from robust_accel.studies.plan import Plan, run_of
from robust_accel.studies.study_file import ClaimSettings
from robust_accel.studies.trial import Cell, Trial

_ROUNDING = 1e-9  # of differences that are equal but for it
Tried = tuple[tuple[str, object], ...]
OUTCOMES = ("holds", "does not hold", "open", "not measured")


@dataclass(frozen=True)
class Tuned:
    """How a cell was tuned.

    Args:
        found: Each combination, and its held-out robust accuracy in percent, None where the
            training was not finite.
        best: The combination that is used.
    """

    cell: Cell
    found: list[tuple[Tried, float | None]]
    best: Tried

    @property
    def at_the_edge(self) -> list[str]:
        """Keys whose best value is the first or the last that was tried."""
        keys = []
        for index, (key, value) in enumerate(self.best):
            values: list[object] = []  # as they were tried; some are lists or mappings
            for tried, _ in self.found:
                values += [tried[index][1]] if tried[index][1] not in values else []
            if len(values) > 2 and value in (values[0], values[-1]):
                keys.append(key)
        return keys


@dataclass(frozen=True)
class Verdict:
    """What a claim comes to in one column.

    Args:
        difference: ``run - than`` in the column's unit, paired by seed; None below two pairs.
        effect: The mean difference in standard deviations of the differences (Cohen's d_z); None
            where they are equal.
        outcome: One of ``OUTCOMES``; open where the interval has both.
        at_the_edge: Row -> what it was tuned by, where the best value is the first or the last.
    """

    claim: ClaimSettings
    column: str
    pairs: int
    difference: Interval | None
    effect: float | None
    outcome: str
    at_the_edge: dict[str, list[str]]


class Results:
    """Numbers of a study, read from its run folders as far as they are there."""

    def __init__(self, plan: Plan, done: Done) -> None:
        self.plan, self.done = plan, done
        self._runs: dict[Trial, Run] = {}
        self._tuned: dict[Cell, Tuned] = {}

    def run(self, trial: Trial) -> Run | None:
        """The run folder of a training, if all is done there."""
        found = self._runs.get(trial)
        if found is None and not self.done.left(trial) and not self.done.failed(trial):
            # a larger measurement, made since, stands for none that was asked for
            found = self._runs[trial] = read_runs([trial.folder], everything=True)[0]
        return found

    def tuned(self, cell: Cell) -> Tuned | None:
        """What a cell was tuned to; None while one of its trainings is missing."""
        if cell not in self._tuned:
            found: list[tuple[Tried, float | None]] = []
            for tried in self.plan.tries(cell):
                trial = self.plan.attempt(cell, tried, self.chosen)
                run = None if trial is None else self.run(trial)
                if trial is None or (run is None and not self.done.failed(trial)):
                    return None
                found.append((tried, None if run is None else held_out(run, trial.recipe)))
            finite = [(value, tried) for tried, value in found if value is not None]
            _, best = max(finite, key=lambda one: one[0], default=(0.0, found[0][0]))
            self._tuned[cell] = Tuned(cell, found, best)
        return self._tuned[cell]

    def chosen(self, cell: Cell) -> Tried | None:
        """The settings that a cell is tuned to; None while that is not known."""
        tries = self.plan.tries(cell)
        if len(tries) == 1:
            return tries[0]
        tuned = self.tuned(cell)
        return None if tuned is None else tuned.best

    def trials(self, cell: Cell) -> list[Trial]:
        """The trainings of a row: one a seed, as far as they can be named."""
        best = self.chosen(cell)
        if best is None:
            return []
        found = [self.plan.trial(cell, best, seed, self.chosen) for seed in self.plan.seeds]
        return [trial for trial in found if trial is not None]

    def values(self, cell: Cell, column: str) -> dict[int, float]:
        """Seed -> the column's number."""
        name, found = self.plan.study.columns[column], {}
        for trial in self.trials(cell):
            run = self.run(trial)
            value = None if run is None else measure(name, run, trial.recipe)
            if value is not None:
                found[trial.seed] = value
        return found

    def lost(self, cell: Cell) -> str:
        """``1 of 3 not finite``, where trainings were not; nothing where all were."""
        trials = self.trials(cell)
        failed = sum(self.done.failed(trial) for trial in trials)
        return f"{failed} of {len(trials)} not finite" if failed else ""

    def all_lost(self, cell: Cell) -> bool:
        """Whether no seed's training was finite."""
        trials = self.trials(cell)
        return bool(trials) and all(self.done.failed(trial) for trial in trials)

    def curve(self, cell: Cell, key: str) -> dict[float, list[float]]:
        """Points of a sweep -> accuracies in percent, one a seed."""
        found: dict[float, list[float]] = {}
        for trial in self.trials(cell):
            run = self.run(trial)
            for point, value in [] if run is None else curve(key, run, trial.recipe):
                found.setdefault(point, []).append(value)
        return found

    @cached_property
    def shown(self) -> list[Cell]:
        """The rows."""
        return [cell for cell in self.plan.cells if not self.plan.runs[cell.run].hidden]

    def has_ended(self, trial: Trial) -> bool:
        """Whether all is done of a training, or its numbers were not finite."""
        return self.run(trial) is not None or self.done.failed(trial)

    def missing(self) -> list[str]:
        """Rows that lack a seed, or the tuning, in words."""
        known = self.plan.known(self.chosen)
        lost = {trial.folder for trial in known if self.done.failed(trial)}
        barred = {trial.cell for trial in known if lost.intersection(trial.needs)}
        return [
            cell.name + (" (what it starts from was not finite)" if cell in barred else "")
            for cell in self.plan.cells
            if not self._is_complete(cell)
        ]

    def _is_complete(self, cell: Cell) -> bool:
        ended = [self.has_ended(trial) for trial in self.trials(cell)]
        return sum(ended) == len(self.plan.seeds)

    def edges(self, cell: Cell) -> list[str]:
        """What a row was tuned by, where the best value is the first or the last."""
        tuned = self.tuned(cell) if len(self.plan.tries(cell)) > 1 else None
        return [] if tuned is None else tuned.at_the_edge

    def verdicts(self) -> list[Verdict]:
        return [
            self._verdict(claim, column)
            for claim in self.plan.study.claims
            if {run_of(claim.run), run_of(claim.than)} <= self.plan.runs.keys()
            for column in claim.columns
        ]

    def _verdict(self, claim: ClaimSettings, column: str) -> Verdict:
        cell, against = self.plan.cell(claim.run), self.plan.cell(claim.than)
        edges = {one.name: keys for one in (cell, against) if (keys := self.edges(one))}
        own, other = self.values(cell, column), self.values(against, column)
        seeds = sorted(own.keys() & other.keys())
        if len(seeds) < 2:
            return Verdict(claim, column, len(seeds), None, None, "not measured", edges)
        pairs = [(own[seed], other[seed]) for seed in seeds]
        difference = paired_difference(*zip(*pairs, strict=True))
        spread = stdev([a - b for a, b in pairs])
        outcome = _outcome(claim, difference)
        # what is left of a run that was not always finite is the better part
        flattered = {"holds": cell, "does not hold": against}.get(outcome)
        if flattered is not None and self.lost(flattered):
            outcome = "open"
        alike = spread <= _ROUNDING * max(1, abs(difference.mean))
        effect = None if alike else difference.mean / spread
        return Verdict(claim, column, len(seeds), difference, effect, outcome, edges)


def _outcome(claim: ClaimSettings, difference: Interval) -> str:
    low, high = difference.low, difference.high
    if claim.holds_if in ("less", "not_greater"):
        low, high = -high, -low
    if claim.holds_if.startswith("not_"):  # a difference of just the margin is allowed
        holds, is_refuted = low >= -claim.margin, high < -claim.margin
    else:
        holds, is_refuted = low > claim.margin, high <= claim.margin
    return "holds" if holds else "does not hold" if is_refuted else "open"


def mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half of its 95% t-interval where there are two values or more."""
    if len(values) < 2:
        return fmean(values), None
    interval = t_interval(values)
    return interval.mean, interval.high - interval.mean
