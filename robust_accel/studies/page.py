"""What a study has found, for people: one Markdown page with its figures; and all of it as JSON.

Of studies that are run as one there is a page with what became of all their claims.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from math import floor, log10
from pathlib import Path
from typing import Any

from robust_accel.files import read_json, write_json, write_text
from robust_accel.reporting.tables import Table, escaped
from robust_accel.reporting.views import Run, refused_by_name
from robust_accel.studies.figures import Figure, figures_of
from robust_accel.studies.results import OUTCOMES, Results, Tuned, Verdict, mean_and_half
from robust_accel.studies.trial import Trial


def write_page(results: Results, folder: Path, name: str, command: str) -> Path:
    """Write ``folder/NAME.md``, ``NAME.json`` and the figures, as PNG and SVG.

    Args:
        command: That makes it again.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = figures_of(results)
    drawn = [(figure.settings.title, figure.draw(folder)) for figure in figures]
    path = folder / f"{name}.md"
    write_json(folder / f"{name}.json", as_json(results, figures, command))
    write_text(path, "\n\n".join(_parts(results, drawn, command)) + "\n")
    return path


def has_more(results: Results, folder: Path, name: str) -> str | None:
    """Why the page in a folder is not to be replaced; None where it is not there, or has less."""
    path = folder / f"{name}.json"
    there = len(read_json(path).get("trainings", ())) if path.exists() else 0
    own = sum(map(results.has_ended, results.plan.known(results.chosen)))
    if there <= own:
        return None
    return f"{path} has {there} trainings, and here are {own}: it is kept, or delete it"


def write_overview(folder: Path, name: str, title: str, studies: Sequence[str]) -> Table:
    """Write ``folder/NAME.md``: what became of the claims of studies whose pages are there.

    Returns:
        A row a study: how many of its comparisons came out how.
    """
    head, rows, parts = ["study", "trainings", *OUTCOMES], [], []
    for study in studies:
        page = read_json(folder / f"{study}.json")
        outcomes = Counter(claim["outcome"] for claim in page["claims"])
        counts = [str(number) if (number := outcomes[key]) else "" for key in OUTCOMES]
        rows.append([study, str(len(page["trainings"])), *counts])
        parts.append(f"## [{escaped(page['title'])}]({study}.md)")
        parts += [claims_table(page["claims"]).markdown()] if page["claims"] else []
    counted = Table(head, rows)
    about = "Comparisons by their outcome; a claim in two columns is two."
    path = folder / f"{name}.md"
    text = [f"# {escaped(title)}: what became of the claims", about, counted.markdown(), *parts]
    write_text(path, "\n\n".join(text) + "\n")
    return counted


def table(results: Results) -> Table:
    """A row a cell: means over the seeds and half of their 95% t-intervals, papers' figures."""
    plan, study = results.plan, results.plan.study
    about = list(dict.fromkeys(key for run in plan.runs.values() for key in run.about))
    published = _published(results)
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


def _published(results: Results) -> set[str]:
    """Columns in which a row has a paper's figure."""
    return {key for cell in results.shown for key in results.plan.runs[cell.run].published}


def number_text(values: Sequence[float]) -> str:
    """``43.52 ± 1.20``; empty where nothing was measured."""
    if not values:
        return ""
    mean, half = mean_and_half(values)
    size = floor(log10(abs(mean))) if mean else 0
    digits = 0 if size >= 3 else max(2, 1 - size)
    text = f"{mean:.{digits}f}"
    return text if half is None else f"{text} ± {half:.{digits}f}"


def _parts(results: Results, drawn: Iterable[tuple[str, Path]], command: str) -> Iterable[str]:
    plan, study = results.plan, results.plan.study
    yield f"# {escaped(study.title)}"
    yield from filter(None, [study.about, plan.scale.about])
    yield table(results).markdown()
    seeds = ", ".join(map(str, plan.seeds))
    yield (
        f"Means over seeds {seeds}, ± half of the 95% t-interval over them; of a single seed, its "
        "number alone."
    )
    if _published(results):
        yield f"Published figures: {study.published_of}."
    missing = results.missing()
    if missing:
        yield "Not finished: " + "; ".join(missing) + "."
    for title, path in drawn:
        yield f"![{escaped(title)}]({path.name})"
    verdicts = results.verdicts()
    if verdicts:
        yield "## Claims"
        yield claims_table([_claim(verdict) for verdict in verdicts]).markdown()
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


def claims_table(claims: Sequence[Mapping[str, Any]]) -> Table:
    """A row a comparison, as ``as_json`` has them."""
    rows = []
    for claim in claims:
        found, size, margin = "", "", claim["margin"]
        if claim["difference"]:
            mean, low, high = claim["difference"]
            found = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        if claim["effect"] is not None:
            size = f"{claim['effect']:+.1f}"
        text = claim["text"] + (f" ({claim['source']})" if claim["source"] else "")
        words = claim["holds_if"].replace("_", " ") + (f" by {margin:g}" if margin else "")
        sides = f"{claim['run']} {words} than {claim['than']}"
        edges = (f"; best {', '.join(keys)} of {row} at the edge of its grid"
                 for row, keys in claim.get("at_the_edge", {}).items())  # fmt: skip
        outcome = claim["outcome"] + "".join(edges)
        rows.append([text, sides, claim["column"], found, size, str(claim["pairs"]), outcome])
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
    known = {trial.folder: trial for trial in results.plan.known(results.chosen)}
    runs = [run for trial in known.values() if (run := results.run(trial))]
    hardware, versions = Counter[str](), Counter[str]()
    for run in runs:
        with refused_by_name(run.folder):
            hardware.update(_hardware(run))
            versions.update(_versions(run))
    seconds = sum(results.done.seconds(known.values()).values())

    def counted(found: Counter[str], between: str) -> str:
        return between.join(
            text if number == len(runs) else f"{text} ({number} of {len(runs)} trainings)"
            for text, number in found.items()
        )

    said = (
        f"{len(known)} trainings, {seconds / 3600:.1f} hours of processes in all"
        + (f", on {counted(hardware, '; ')}" if hardware else ""),
        counted(versions, ", "),
        date.today().isoformat(),
    )
    return f"{'; '.join(filter(None, said))}."


def _hardware(run: Run) -> list[str]:
    """Where it was trained and measured."""
    found = [run.report.get("hardware"), *(row.get("hardware") for row in run.rows)]
    return [*dict.fromkeys(str(name) for name in found if name)]


def _versions(run: Run) -> list[str]:
    return [f"{name} {number}" for name, number in run.report.get("versions", {}).items()]


def as_json(results: Results, figures: Sequence[Figure], command: str) -> dict[str, Any]:
    """Every number with its seed, training and digest; figures; claims; what was tuned.

    ``trainings`` are those that are done; ``earlier`` has those of earlier tables that were not
    done since: by it a changed recipe is known until it is trained.
    """
    plan = results.plan
    trainings = [_training(results, t) for t in plan.known(results.chosen) if results.has_ended(t)]
    names = {line["name"] for line in trainings}
    return {
        "title": plan.study.title,
        "command": command,
        "seeds": list(plan.seeds),
        "missing": results.missing(),
        "trainings": trainings,
        "earlier": [line for name, line in results.done.earlier.items() if name not in names],
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
        "figures": [figure.as_json() for figure in figures],
        "claims": [_claim(verdict) for verdict in results.verdicts()],
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


def _claim(verdict: Verdict) -> dict[str, Any]:
    claim, d = verdict.claim, verdict.difference
    return {
        "text": claim.text,
        "source": claim.source,
        "run": claim.run,
        "than": claim.than,
        "holds_if": claim.holds_if,
        "margin": claim.margin,
        "column": verdict.column,
        "pairs": verdict.pairs,
        "difference": d and [d.mean, d.low, d.high],
        "effect": verdict.effect,
        "outcome": verdict.outcome,
        "at_the_edge": verdict.at_the_edge,
    }


def _training(results: Results, trial: Trial) -> dict[str, Any]:
    line = {"name": trial.name, "digest": trial.digest, "folder": trial.folder.name}
    run = results.run(trial)
    if run is None:
        return line
    with refused_by_name(run.folder):
        made = {"hardware": "; ".join(_hardware(run)), "versions": ", ".join(_versions(run))}
        return line | made
