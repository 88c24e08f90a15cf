"""What a study has found, for people: one Markdown page with its figures; and all of it as JSON."""

from collections.abc import Iterable, Sequence
from datetime import date
from math import floor, log10
from pathlib import Path
from typing import Any

from robust_accel.files import write_json, write_text
from robust_accel.reporting.charts import Line, Lines
from robust_accel.reporting.figures import draw
from robust_accel.reporting.tables import Table, escaped
from robust_accel.reporting.views import refused_by_name
from robust_accel.studies.plan import Plan
from robust_accel.studies.results import Results, Tuned, Verdict, mean_and_half
from robust_accel.studies.study_file import FigureSettings
from robust_accel.studies.trial import Cell

_X_LABELS = {"eps": "eps (1/255)", "num_steps": "steps", "radius": "L2 radius"}


def write_page(results: Results, folder: Path, name: str, command: str) -> Path:
    """Write ``folder/NAME.md``, ``NAME.json`` and the figures, as PNG and SVG.

    Args:
        command: That makes it again.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = [_figure(results, figure) for figure in results.plan.study.figures]
    drawn = [(chart, draw(chart, folder)) for chart in figures if chart.lines]
    path = folder / f"{name}.md"
    write_json(folder / f"{name}.json", as_json(results, command))
    write_text(path, "\n\n".join(_parts(results, drawn, command)) + "\n")
    return path


def table(results: Results) -> Table:
    """A row a cell: means over the seeds and half of their 95% t-intervals, papers' figures."""
    plan, study = results.plan, results.plan.study
    about = list(dict.fromkeys(key for run in plan.runs.values() for key in run.about))
    published = {key for run in plan.runs.values() for key in run.published}
    head = ["run", *(study.grid[axis].label for axis in plan.axes), *about]
    keys = list(
        dict.fromkeys(key for c in plan.cells for tried in plan.tries(c) for key, _ in tried)
    )
    head += [key.split(".")[-1] for key in keys]
    for column in study.columns:
        head += [column] + ([f"{column}, published"] if column in published else [])
    rows = []
    for cell in results.shown:
        run = plan.runs[cell.run]
        labels, best = dict(cell.labels), dict(results.chosen(cell) or ())
        line = [run.label or cell.run, *(labels.get(axis, "") for axis in plan.axes)]
        line += [run.about.get(key, "") for key in about]
        line += [f"{best[key]}" if key in best else "" for key in keys]
        for column in study.columns:
            text = number_text(list(results.values(cell, column).values()))
            lost = results.lost(cell)
            if text:
                line.append(f"{text} ({lost})" if lost else text)
            else:  # else it is not measured
                line.append(lost if results.all_lost(cell) else "")
            if column in published:
                value = run.published.get(column)
                line.append("" if value is None else f"{value:g}")
        rows.append(line)
    return Table(head, rows)


def number_text(values: Sequence[float]) -> str:
    """``43.52 ± 1.20``; empty where nothing was measured."""
    if not values:
        return ""
    mean, half = mean_and_half(values)
    size = floor(log10(abs(mean))) if mean else 0
    digits = 0 if size >= 3 else max(2, 1 - size)
    text = f"{mean:.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def _parts(results: Results, drawn: Iterable[tuple[Lines, Path]], command: str) -> Iterable[str]:
    plan, study = results.plan, results.plan.study
    yield f"# {escaped(study.title)}"
    yield from filter(None, [study.about, plan.scale.about])
    yield table(results).markdown()
    seeds = ", ".join(map(str, plan.seeds))
    yield (
        f"Means over seeds {seeds}, ± half of the 95% t-interval over them; of a single seed, its "
        "number alone."
    )
    if study.published_of:
        yield f"Published figures: {study.published_of}."
    missing = results.missing()
    if missing:
        yield "Not finished: " + "; ".join(missing) + "."
    for chart, path in drawn:
        yield f"![{escaped(chart.title)}]({path.name})"
    verdicts = results.verdicts()
    if verdicts:
        yield "## Claims"
        yield _claims(verdicts).markdown()
        yield (
            "The difference is paired: of runs that share a seed; in brackets its 95% t-interval, "
            "then its size in standard deviations (Cohen's d_z). A claim holds where the whole "
            f"interval is on its side, and is open where the interval has both. Of {len(verdicts)} "
            "comparisons at 95%, one in twenty comes out by chance."
        )
    tuned = [found for cell in plan.cells if len(plan.tries(cell)) > 1
             and (found := results.tuned(cell)) is not None]  # fmt: skip
    if tuned:
        yield "## Tuning"
        yield _tuning(tuned).markdown()
        yield (
            f"Robust accuracy (%) on images held out of train, seed {plan.seeds[0]}; the best is "
            "used for all seeds. The test images choose nothing."
        )
    yield "## How"
    yield "```sh\n" + command + "\n```"
    yield _how(results)


def _claims(verdicts: Sequence[Verdict]) -> Table:
    rows = []
    for verdict in verdicts:
        claim, d = verdict.claim, verdict.difference
        found = "" if d is None else f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]"
        size = "" if verdict.effect is None else f"{verdict.effect:+.1f}"
        text = claim.text + (f" ({claim.source})" if claim.source else "")
        words = claim.holds_if.replace("_", " ") + (f" by {claim.margin:g}" if claim.margin else "")
        sides = f"{claim.run} {words} than {claim.than}"
        rows.append([text, sides, verdict.column, found, size, str(verdict.pairs), verdict.outcome])
    head = ["claim", "holds if", "in", "difference [95%]", "effect", "pairs", "outcome"]
    return Table(head, rows)


def _tuning(tuned: Sequence[Tuned]) -> Table:
    rows = []
    for found in tuned:
        values = [
            ("**{}**" if tried == found.best else "{}").format(
                ", ".join(str(value) for _, value in tried)
                + (": not finite" if accuracy is None else f": {accuracy:.1f}")
            )
            for tried, accuracy in found.found
        ]
        edge = ", ".join(found.at_the_edge)
        keys = ", ".join(key for key, _ in found.best)
        rows.append(
            [found.cell.name, keys, "; ".join(values), f"best at the edge: {edge}" if edge else ""]
        )
    return Table(["run", "tuned", "tried: held-out robust accuracy", ""], rows)


def _how(results: Results) -> str:
    """On what, with what, and how long."""
    runs = [run for c in results.plan.cells for t in results.trials(c) if (run := results.run(t))]
    hardware: dict[str, None] = {}
    versions: dict[str, None] = {}
    for run in runs:
        with refused_by_name(run.folder):
            hardware |= {str(row["hardware"]): None for row in run.rows if "hardware" in row}
            found = run.report.get("versions", {}).items()
            versions |= {f"{name} {version}": None for name, version in found}
    seconds = sum(results.done.seconds(results.plan.known(results.chosen)).values())
    trainings = len({trial.folder for trial in results.plan.known(results.chosen)})
    said = (
        f"{trainings} trainings, {seconds / 3600:.1f} hours of processes in all"
        + (f", on {'; '.join(hardware)}" if hardware else ""),
        ", ".join(versions),
        date.today().isoformat(),
    )
    return f"{'; '.join(filter(None, said))}."


def _figure(results: Results, figure: FigureSettings) -> Lines:
    """Curves of means, with the 95% t-interval over seeds as a band."""
    plan = results.plan
    names = figure.runs or tuple(plan.runs)
    cells = [cell for cell in results.shown if cell.run in names]
    lines: list[Line] = []
    if figure.x in plan.axes:
        groups: dict[tuple[str, ...], list[Cell]] = {}
        for cell in cells:
            others = (label for axis, label in cell.labels if axis != figure.x)
            groups.setdefault((plan.runs[cell.run].label or cell.run, *others), []).append(cell)
        for column in figure.y:
            for name, group in groups.items():
                at = {x: list(results.values(c, column).values())
                      for c in group for x in _places(c, figure.x, plan)}  # fmt: skip
                text = ", ".join(name) + (f", {column}" if len(figure.y) > 1 else "")
                lines += _line(text, at, len(lines))
        x_label = plan.study.grid[figure.x].label
    else:
        for cell in cells:
            at = results.curve(cell, figure.x)
            if figure.x == "eps":
                at = {255 * eps: values for eps, values in at.items()}
            label = ", ".join([plan.runs[cell.run].label or cell.run, *dict(cell.labels).values()])
            lines += _line(label, at, len(lines))
        x_label = _X_LABELS[figure.x]
    y_label = figure.y[0] if len(figure.y) == 1 else "accuracy (%)"
    return Lines(figure.name, figure.title, x_label, y_label, lines, percent=False, log=figure.log)


def _places(cell: Cell, axis: str, plan: Plan) -> list[float]:
    """Where a row stands on an axis: everywhere, if the axis does not multiply it."""
    own = dict(cell.labels).get(axis)
    return [float(label) for label in (plan.axes[axis] if own is None else [own])]


def _line(name: str, at: dict[float, list[float]], color: int) -> list[Line]:
    points = sorted((x, *mean_and_half(values)) for x, values in at.items() if values)
    if not points:
        return []
    x, y, halves = zip(*points, strict=True)
    band = [half or 0.0 for half in halves]
    low = [mean - half for mean, half in zip(y, band, strict=True)] if any(band) else []
    high = [mean + half for mean, half in zip(y, band, strict=True)] if any(band) else []
    return [Line(name, x, y, low, high, markers=True, color=color)]


def as_json(results: Results, command: str) -> dict[str, Any]:
    """Every number with its seed, training and digest; claims; what was tuned."""
    plan = results.plan
    return {
        "title": plan.study.title,
        "command": command,
        "seeds": list(plan.seeds),
        "missing": results.missing(),
        "trainings": [
            {"name": trial.name, "digest": trial.digest, "folder": trial.folder.name}
            for trial in plan.known(results.chosen)
        ],
        "rows": [
            {
                "run": cell.run,
                "labels": dict(cell.labels),
                "settings": dict(results.chosen(cell) or ()),
                "values": {c: results.values(cell, c) for c in plan.study.columns},
                "lost": results.lost(cell),
                "published": plan.runs[cell.run].published,
            }
            for cell in results.shown
        ],
        "claims": [
            {
                "text": v.claim.text,
                "source": v.claim.source,
                "run": v.claim.run,
                "than": v.claim.than,
                "holds_if": v.claim.holds_if,
                "margin": v.claim.margin,
                "column": v.column,
                "pairs": v.pairs,
                "difference": v.difference
                and [v.difference.mean, v.difference.low, v.difference.high],
                "effect": v.effect,
                "outcome": v.outcome,
            }
            for v in results.verdicts()
        ],
        "tuning": [
            {
                "row": found.cell.name,
                "tried": [{"settings": dict(t), "held_out": a} for t, a in found.found],
                "best": dict(found.best),
            }
            for cell in plan.cells
            if len(plan.tries(cell)) > 1 and (found := results.tuned(cell)) is not None
        ],
    }
