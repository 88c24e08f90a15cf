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

Tried = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Tuned:
    """How a cell was tuned.

    Args:
        found: Held-out robust accuracy in percent of each combination, None where the training was
            not finite.
        best: The combination that is used.
    """

    cell: Cell
    found: dict[Tried, float | None]
    best: Tried

    @property
    def at_the_edge(self) -> list[str]:
        """Keys whose best value is the first or the last that was tried."""
        keys = []
        for index, (key, value) in enumerate(self.best):
            values = list(dict.fromkeys(tried[index][1] for tried in self.found))
            if len(values) > 2 and value in (values[0], values[-1]):
                keys.append(key)
        return keys


@dataclass(frozen=True)
class Verdict:
    """What a claim comes to in one column.

    Args:
        difference: ``run - than`` in the column's unit, paired by seed; None below two pairs.
        effect: The mean difference in standard deviations of the differences (Cohen's d_z).
        outcome: ``holds``, ``does not hold``, ``open`` (the interval has both), ``not measured``.
    """

    claim: ClaimSettings
    column: str
    pairs: int
    difference: Interval | None
    effect: float | None
    outcome: str


class Results:
    """Numbers of a study, read from its run folders as far as they are there."""

    def __init__(self, plan: Plan, done: Done) -> None:
        self.plan, self.done = plan, done
        self._runs: dict[Trial, Run | None] = {}
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
            found: dict[Tried, float | None] = {}
            for tried in self.plan.tries(cell):
                trial = self.plan.trial(cell, tried, self.plan.seeds[0], self.chosen)
                run = None if trial is None else self.run(trial)
                if trial is None or (run is None and not self.done.failed(trial)):
                    return None
                found[tried] = None if run is None else held_out(run, trial.recipe)
            finite = {tried: value for tried, value in found.items() if value is not None}
            best = max(finite, key=lambda tried: finite[tried], default=next(iter(found)))
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

    def missing(self) -> list[str]:
        """Names of rows that lack a seed, or the tuning."""
        return [cell.name for cell in self.plan.cells if not self._is_complete(cell)]

    def _is_complete(self, cell: Cell) -> bool:
        trials = self.trials(cell)
        ended = [self.run(t) is not None or self.done.failed(t) for t in trials]
        return sum(ended) == len(self.plan.seeds)

    def verdicts(self) -> list[Verdict]:
        return [
            self._verdict(claim, column)
            for claim in self.plan.study.claims
            if {run_of(claim.run), run_of(claim.than)} <= self.plan.runs.keys()
            for column in claim.columns
        ]

    def _verdict(self, claim: ClaimSettings, column: str) -> Verdict:
        own, other = (self.values(self._cell(side), column) for side in (claim.run, claim.than))
        seeds = sorted(own.keys() & other.keys())
        if len(seeds) < 2:
            return Verdict(claim, column, len(seeds), None, None, "not measured")
        pairs = [(own[seed], other[seed]) for seed in seeds]
        difference = paired_difference(*zip(*pairs, strict=True))
        spread = stdev([a - b for a, b in pairs])
        effect = difference.mean / spread if spread else None
        outcome = _outcome(claim, difference)
        if outcome == "holds" and self.lost(self._cell(claim.run)):
            outcome = "open"  # what is left of it is the better part
        return Verdict(claim, column, len(seeds), difference, effect, outcome)

    def _cell(self, text: str) -> Cell:
        return self.plan.cell(text)


def _outcome(claim: ClaimSettings, difference: Interval) -> str:
    low, high = difference.low, difference.high
    if claim.holds_if in ("less", "not_greater"):
        low, high = -high, -low
    least = -claim.margin if claim.holds_if.startswith("not_") else claim.margin
    if low > least:
        return "holds"
    return "does not hold" if high < least else "open"


def mean_and_half(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half of its 95% t-interval where there are two values or more."""
    if len(values) < 2:
        return fmean(values), None
    interval = t_interval(values)
    return interval.mean, interval.high - interval.mean
