"""Tables of plain text cells, as Markdown; and runs side by side."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from robust_accel.reporting.views import (
    Quoted,
    Row,
    Run,
    accuracy_text,
    attack_text,
    cell,
    percent,
    pick,
    quoted,
    settings_text,
    source_text,
    threat_text,
)
from robust_accel.statistics import t_interval


@dataclass(frozen=True)
class Table:
    """Cells of a table, as they are to be read: each view escapes them in its own way."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def markdown(self) -> str:
        """Aligned, so that it is readable in a terminal, too."""
        cells = [[escaped(text) for text in line] for line in (self.head, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in cells]
        padded.insert(1, ["-" * width for width in widths])
        return "\n".join("| " + " | ".join(line) + " |" for line in padded)

    def html(self) -> str:
        """For a notebook."""
        head = "".join(f"<th>{escape(text)}</th>" for text in self.head)
        rows = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in self.rows)
        body = "".join(f"<tr>{cells}</tr>" for cells in rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is within a table's cell."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text.replace("<", "&lt;").replace("](", "]\\(")


def fenced(text: str) -> str:
    """A block of YAML in Markdown that no text within it ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text}\n{fence}"


def comparison(runs: Sequence[Run]) -> Table:
    """One row a run and threat model, and the mean over runs that differ in nothing but the seed.

    What no run has gets no column: other images, certified accuracy, seconds of an epoch.
    """
    entries = [(run, entry) for run in runs for entry in quoted(run) or [_NOTHING]]
    columns = ["run", "images of", "threat model", "clean (%)", "PGD (%)", "AutoAttack (%)"]
    columns += ["certified (%)", _CORRUPTED, "s/epoch"]
    lines = [[run.name, *_cells(entry), _corrupted(run), _seconds(run)] for run, entry in entries]
    lines += _means(runs)
    left_out = set()
    if len({entry.source for _, entry in entries if entry.source}) < 2:
        left_out.add("images of")
    if not any(entry.certified for _, entry in entries):
        left_out.add("certified (%)")
    if not any(map(_corrupted, runs)):
        left_out.add(_CORRUPTED)
    if not any(map(_seconds, runs)):
        left_out.add("s/epoch")
    kept = [i for i, column in enumerate(columns) if column not in left_out]
    return Table(
        [columns[i] for i in kept],
        [[line[i] for i in kept] for line in lines],
        "Accuracy with its 95% Wilson interval in brackets, the attack, and on how many images.",
    )


_CORRUPTED = "corruption error (%)"
_NOTHING = Quoted("", None, None, None, None, None)


def _cells(entry: Quoted) -> list[str]:
    numbers = [cell(row) for row in (entry.clean, entry.pgd, entry.autoattack)]
    return [entry.source, threat_text(entry.threat), *numbers, _certified(entry)]


def _certified(entry: Quoted) -> str:
    if entry.certified is None:
        return ""
    row, point = entry.certified
    attack = row["attack"]
    about = f"{attack['method']}, sigma {attack['sigma']:.4g}, n={row['images']['n']}"
    return f"{accuracy_text(point)} ({about})"


def _corrupted(run: Run) -> str:
    row = pick(run.of("corruptions"))
    if row is None:
        return ""
    number, of = row["images"]["n"], row["attack"]
    over = f"{len(of['corruptions'])} x {len(of['severities'])}"
    return f"{percent(row['mean_error'])} (mean of {over}, {of['by']}, n={number})"


def _seconds(run: Run) -> str:
    seconds = run.report.get("train_seconds_per_epoch")
    return "" if seconds is None else f"{seconds:.1f}"


def _means(runs: Sequence[Run]) -> list[list[str]]:
    """A row a threat model for each group of runs that differ in nothing but the seed."""
    groups: dict[str, dict[str, Run]] = {}
    for run in runs:
        if "recipe" in run.report:
            same, seed = _but_for_the_seed(run.report["recipe"])
            # a run named twice, or a copy of it, is no second seed
            groups.setdefault(same, {}).setdefault(seed, run)
    lines = []
    for group in groups.values():
        seeds = [quoted(run) for run in group.values()]
        if len(seeds) < 2:
            continue
        for entry in seeds[0]:
            same_threat = [
                next((e for e in own if (e.source, e.threat) == (entry.source, entry.threat)), None)
                for own in seeds
            ]
            whole = [e for e in same_threat if e is not None]
            if len(whole) == len(seeds):
                lines.append(_mean_line(whole))
    return lines


def _mean_line(entries: list[Quoted]) -> list[str]:
    first = entries[0]
    columns = [[e.clean for e in entries], [e.pgd for e in entries]]
    columns.append([e.autoattack for e in entries])
    about = [first.source, threat_text(first.threat)]
    return [f"mean of {len(entries)}", *about, *map(_mean, columns), "", "", ""]


def _mean(rows: list[Row | None]) -> str:
    """Mean and t-interval; of the same attack on as many images, or it is said that it is not."""
    measured = [row for row in rows if row is not None]
    if len(measured) < len(rows):
        return ""
    if len({(json.dumps(r["attack"], sort_keys=True), r["images"]["n"]) for r in measured}) > 1:
        return "attacks or images differ"
    interval = t_interval([row["accuracy"] for row in measured])
    half = percent(interval.high - interval.mean)
    return f"{percent(interval.mean)} +- {half} ({len(rows)} seeds, t-interval)"


def _but_for_the_seed(recipe: dict[str, Any]) -> tuple[str, str]:
    """What runs of several seeds have in common, and the seeds."""
    left_out = ("output", "evaluate", "certify")  # how it was measured stands in each row
    recipe = {
        k: dict(v) if isinstance(v, dict) else v for k, v in recipe.items() if k not in left_out
    }
    sections = [recipe.get(key) or {} for key in ("train", "communication")]
    seeds = [section.pop("seed", None) for section in sections]
    return json.dumps(recipe, sort_keys=True, default=str), json.dumps(seeds)


def short_table(rows: Sequence[Row]) -> Table:
    """Every row, by what it is known by."""
    lines = [_measurement(row) for row in rows]
    kept = [i for i, name in enumerate(_COLUMNS) if name in _SHORT]
    return Table(_SHORT, [[line[i] for i in kept] for line in lines])


def measurement_table(rows: Sequence[Row]) -> Table:
    """Every row, with what it was measured by and what it cost."""
    return Table(_COLUMNS, [_measurement(row) for row in rows])


_COLUMNS = (
    "purpose", "attack", "settings", "threat model", "n", "images", "accuracy (%)",
    "clean, same images (%)", "seed", "seconds", "forward passes", "hardware", "measured", "record",
)  # fmt: skip
_SHORT = ("purpose", "attack", "threat model", "n", "accuracy (%)")


def _measurement(row: Row) -> list[str]:
    images, clean = row["images"], row.get("clean_accuracy")
    where = ", ".join(filter(None, [images.get("selection", ""), source_text(images)]))
    point = row.get("point")
    purpose = row["purpose"] + (f", {point['key']}" if point else "")
    return [
        purpose,
        attack_text(row["attack"]),
        settings_text(row["attack"]),
        threat_text(row.get("threat_model")),
        str(images["n"]),
        where,
        accuracy_text(row),
        "" if clean is None else percent(clean),
        str(row.get("seed", "")),
        f"{row['seconds']:.1f}" if "seconds" in row else "",
        f"{row['forward_passes']:,}" if "forward_passes" in row else "",
        row.get("hardware") or row.get("device") or "",
        str(row.get("time", ""))[:16].replace("T", " "),
        str(row.get("key", ""))[:8],
    ]
