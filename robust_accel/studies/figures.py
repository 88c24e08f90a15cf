"""A study's figures: curves, or bars of its rows' means; drawn, and as numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

from robust_accel.reporting.charts import Line, Lines
from robust_accel.reporting.figures import COLORS, draw, saved_figure, tidy
from robust_accel.studies.plan import Plan
from robust_accel.studies.results import Results, mean_and_half
from robust_accel.studies.study_file import FigureSettings
from robust_accel.studies.trial import Cell

_X_LABELS = {"eps": "eps (1/255)", "num_steps": "steps", "radius": "L2 radius"}


class Point(NamedTuple):
    """A mean over seeds, and half of its 95% t-interval, where there are several.

    Args:
        x: Of a bar the row's place.
    """

    x: float
    mean: float
    half: float | None
    published: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.half is None else (self.mean - self.half, self.mean + self.half)


class Series(NamedTuple):
    """A curve, or the bars of one column."""

    name: str
    points: list[Point]


@dataclass(frozen=True)
class Figure:
    """What is drawn.

    Args:
        rows: Names of the bars' rows; none of curves.
    """

    settings: FigureSettings
    x_label: str
    y_label: str
    series: list[Series]
    rows: Sequence[str] = ()

    def draw(self, folder: Path) -> Path:
        """Write ``folder/NAME.png`` and ``folder/NAME.svg``; returns the first."""
        if not self.rows:
            return draw(self._lines(), folder)
        path = folder / f"{self.settings.name}.png"
        self._draw_bars(path)
        return path

    def as_json(self) -> dict[str, Any]:
        """Its points; of a bar x is the row's name."""

        def point(one: Point) -> dict[str, Any]:
            x = self.rows[int(one.x)] if self.rows else one.x
            line = {"x": x, "mean": one.mean, "interval": one.interval}
            return line if one.published is None else line | {"published": one.published}

        return {
            "name": self.settings.name,
            "title": self.settings.title,
            "x": self.x_label,
            "y": self.y_label,
            "series": [
                {"name": name, "points": [point(one) for one in points]}
                for name, points in self.series
            ],
        }

    def _lines(self) -> Lines:
        lines = []
        for color, (name, points) in enumerate(self.series):
            x, y, low, high = zip(
                *((p.x, p.mean, *(p.interval or (nan, nan))) for p in points), strict=True
            )
            lines.append(Line(name, x, y, low, high, markers=True, color=color))
        own = self.settings
        return Lines(
            own.name, own.title, self.x_label, self.y_label, lines, percent=False, log=own.log
        )

    def _draw_bars(self, path: Path) -> None:
        number = len(self.series)
        width = 0.8 / number
        inches = 1.4 + len(self.rows) * (0.2 + 0.22 * number)
        with saved_figure(path, self.settings.title, 6.4, inches) as axes:
            axis, handles = axes[0, 0], []
            for place, (name, points) in enumerate(self.series):
                at = [point.x + (place - (number - 1) / 2) * width for point in points]
                means = [point.mean for point in points]
                color = COLORS[place % len(COLORS)]
                handles.append(axis.barh(at, means, 0.9 * width, color=color, label=name))
                halves = [nan if point.half is None else point.half for point in points]
                axis.errorbar(means, at, xerr=halves, fmt="none", ecolor="black", capsize=2.5)
                marks = [(p.published, y) for p, y in zip(points, at, strict=True)
                         if p.published is not None]  # fmt: skip
                if marks:
                    x, y = zip(*marks, strict=True)
                    (mark,) = axis.plot(x, y, "D", color="black", mfc="white", label="published")
                    handles = [one for one in handles if one.get_label() != "published"] + [mark]
            axis.set_yticks(range(len(self.rows)), ["\n".join(wrap(row, 32)) for row in self.rows])
            axis.invert_yaxis()  # the first row above
            axis.set(xlabel=self.y_label, axisbelow=True)
            if len(handles) > 1:
                axis.figure.legend(
                    handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False
                )
            tidy(axis)
            axis.grid(axis="y", visible=False)


def figures_of(results: Results) -> list[Figure]:
    """The figures of a study of which anything was measured."""
    found = [_figure(results, settings) for settings in results.plan.study.figures]
    return [figure for figure in found if figure.series]


def _figure(results: Results, settings: FigureSettings) -> Figure:
    plan, x = results.plan, settings.x
    names = settings.runs or tuple(plan.runs)
    cells = [cell for cell in results.shown if cell.run in names]
    y_label = settings.y[0] if len(settings.y) == 1 else "accuracy (%)"
    if x is None:
        shown = [cell for cell in cells if any(results.values(cell, c) for c in settings.y)]
        rows = [_name(plan, cell) for cell in shown]
        return Figure(settings, "", y_label, _bars(results, settings.y, shown), rows)
    if x in plan.axes:
        label = plan.study.grid[x].label
        return Figure(settings, label, y_label, _along(results, settings.y, cells, x))
    scale = 255 if x == "eps" else 1
    series = []
    for cell in cells:
        at = {scale * point: values for point, values in results.curve(cell, x).items()}
        series.append(Series(_name(plan, cell), _points(at)))
    return Figure(settings, _X_LABELS[x], y_label, _measured(series))


def _bars(results: Results, columns: Sequence[str], cells: Sequence[Cell]) -> list[Series]:
    """Means of each column, a bar a row."""
    series = []
    for column in columns:
        points = [
            Point(row, *mean_and_half(values), results.plan.runs[cell.run].published.get(column))
            for row, cell in enumerate(cells)
            if (values := [*results.values(cell, column).values()])
        ]
        series.append(Series(column, points))
    return _measured(series)


def _along(
    results: Results, columns: Sequence[str], cells: Sequence[Cell], axis: str
) -> list[Series]:
    """Curves of columns against an axis of the grid."""
    plan = results.plan
    groups: dict[tuple[str, str], list[Cell]] = {}  # two runs may have one label
    for cell in cells:
        groups.setdefault((cell.run, _name(plan, cell, axis)), []).append(cell)
    series = []
    for column in columns:
        for (_, name), group in groups.items():
            at = {x: list(results.values(c, column).values())
                  for c in group for x in _places(c, axis, plan)}  # fmt: skip
            series.append(Series(name + (f", {column}" if len(columns) > 1 else ""), _points(at)))
    return _measured(series)


def _name(plan: Plan, cell: Cell, without: str = "") -> str:
    """A row's label, and those of the axes but one."""
    labels = (label for axis, label in cell.labels if axis != without)
    return ", ".join([plan.runs[cell.run].label or cell.run, *labels])


def _places(cell: Cell, axis: str, plan: Plan) -> list[float]:
    """Where a row stands on an axis: everywhere, if the axis does not multiply it."""
    own = dict(cell.labels).get(axis)
    return [float(label) for label in (plan.axes[axis] if own is None else [own])]


def _points(at: Mapping[float, Sequence[float]]) -> list[Point]:
    return [Point(x, *mean_and_half(values)) for x, values in sorted(at.items()) if values]


def _measured(series: Sequence[Series]) -> list[Series]:
    return [one for one in series if one.points]
