"""Runs as the views see them: rows of report.json, which of them to quote, how a number is written.

A row is one measurement with its own norm, eps, images and attack; ``evaluation/ledger.py`` fills
them in. report.md, report.html, the model card and the exports show what stands here.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from robust_accel.evaluation.ledger import read_records, shown
from robust_accel.evaluation.records import Report, attack_text, check
from robust_accel.messages import printable
from robust_accel.run_folder import RunFolder
from robust_accel.settings import eps_text

Row = dict[str, Any]

_LONGEST = 4000  # characters of a text
_VERSIONS = ("quick", "rand", "standard")  # of AutoAttack, the weakest first


@dataclass(frozen=True)
class Run:
    """A run folder with what was measured of its model.

    Args:
        name: The folder's, or its path where several runs of a view share the name.
        report: ``report.json``.
        rows: The measurements to show.
    """

    folder: RunFolder
    name: str
    report: dict[str, Any]
    rows: list[Row]

    @property
    def model(self) -> dict[str, Any]:
        return self.report.get("model") or {}

    @cached_property
    def sources(self) -> Counter[str]:
        """How many sets of images from each source were measured on."""
        return Counter(source for source, _ in {image_set(row) for row in self.rows})

    def of(self, purpose: str, attack: str | None = None) -> list[Row]:
        """Rows of a purpose, and of an attack if one is named."""
        rows = [row for row in self.rows if row["purpose"] == purpose]
        return [row for row in rows if attack in (None, row["attack"]["name"])]

    def class_name(self, index: int) -> str:
        """A class's name, or its number where no names are known."""
        names = self.model.get("class_names") or []
        return str(names[index]) if 0 <= index < len(names) else str(index)

    def class_names(self, number: int) -> list[str]:
        return [self.class_name(index) for index in range(number)]


def read_runs(paths: Sequence[str | Path], *, everything: bool = False) -> list[Run]:
    """The runs in these folders.

    Args:
        everything: Of the ledger, where there is one, also rows that a larger measurement stands
            for.

    Raises:
        ValueError: Nothing was measured in one of them.
    """
    folders = [Path(path) for path in paths]
    names = [printable(folder.name or folder.resolve().name) for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        report = tidy(RunFolder(folder).read_report())
        if not report:
            said = "no report.json: nothing was measured there yet"
            raise ValueError(f"{folder}: {said if Path(folder).is_dir() else 'no such folder'}")
        check(Report, [report], str(RunFolder(folder).report))
        name = name if names.count(name) == 1 else printable(str(folder))
        rows = report.get("measurements", [])
        if everything and (found := read_records(folder)):
            function = str((report.get("model") or {}).get("function"))
            rows = tidy(shown(found, function, everything=True))
        runs.append(Run(RunFolder(folder), name, report, rows))
    return runs


def tidy(found: Any) -> Any:
    """JSON of a stranger's folder as it may be shown: printable text, not too long; finite numbers.

    What is not finite is None.
    """
    if isinstance(found, dict):
        return {tidy(key): tidy(value) for key, value in found.items()}
    if isinstance(found, list):
        return [tidy(value) for value in found]
    if isinstance(found, str):
        text = printable(found)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return None if isinstance(found, float) and not math.isfinite(found) else found


# of code that meets other data than it expects
_FAULTS = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RuntimeError)


@contextmanager
def refused_by_name(folder: RunFolder) -> Iterator[None]:
    """Of a run whose files do not hold what they should, this is said, and of which."""
    try:
        yield
    except _FAULTS as error:
        raise ValueError(
            f"{folder.path} cannot be shown: its files are not as robust-accel writes them "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from error


# How numbers are written.


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


def interval_text(interval: Sequence[float]) -> str:
    return f"[{percent(interval[0])}, {percent(interval[1])}]"


def accuracy_text(row: Row) -> str:
    """``75.00 [68.57, 80.48]``, in percent; of checks how many had which verdict; else empty."""
    if row.get("accuracy") is None:
        found = Counter(str(check["status"]) for check in row.get("checks", ()))
        return ", ".join(f"{number} {status}" for status, number in found.items())
    interval = f" {interval_text(row['interval'])}" if row.get("interval") else ""
    return percent(row["accuracy"]) + interval


def threat_text(threat: dict[str, Any] | None) -> str:
    """``l2, eps 0.5``; of several balls ``union of linf 8/255, l2 0.5``."""
    if threat is None:
        return ""
    if "union" in threat:
        balls = (f"{ball['norm']} {eps_text(ball['eps'])}" for ball in threat["union"])
        return f"union of {', '.join(balls)}"
    return f"{threat['norm']}, eps {eps_text(threat['eps'])}"


def attack_title(row: Row) -> str:
    """A row's attack in short, ``clean`` where there is none."""
    return "clean" if row["attack"]["name"] == "none" else attack_text(row["attack"])


def settings_text(attack: dict[str, Any]) -> str:
    """All settings of an attack."""
    return "; ".join(f"{k} {plain(v)}" for k, v in attack.items() if k != "name" and v is not None)


def plain(value: Any) -> str:
    """A setting or fact: numbers with four digits, lists with commas."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(plain, value)) if isinstance(value, list | tuple) else str(value)


def source_text(images: dict[str, Any]) -> str:
    """Where images are from: path, configuration and split, then what else was said."""
    source = {k: v for k, v in images.get("source", {}).items() if v is not None}
    words = [str(source.pop(key)) for key in ("path", "config", "split") if key in source]
    rest = ", ".join(f"{key} {plain(value)}" for key, value in source.items())
    return " ".join(words) + (f" ({rest})" if rest else "")


def which_images(run: Run, images: dict[str, Any]) -> str:
    """`` of sklearn:digits test``; empty where the run was measured on one set of images alone."""
    source = source_text(images)
    if run.sources == {source: 1}:
        return ""
    selection = images.get("selection") if run.sources[source] > 1 else None
    words = ", ".join(filter(None, [source, selection]))
    return f" of {words}" if words else ""


def images_text(run: Run, row: Row) -> str:
    """``200 images``, and which where the run was measured on several sets."""
    return f"{row['images']['n']} images{which_images(run, row['images'])}"


def about(run: Run, row: Row) -> str:
    """``PGD-20, linf, eps 8/255, 200 images``: what tells a measurement in titles and captions."""
    parts = [attack_title(row), threat_text(row.get("threat_model")), images_text(run, row)]
    return ", ".join(filter(None, parts))


def finding(row: Row) -> str:
    """How many images met NaN or Inf; empty where none did."""
    positions = {i for found in row.get("non_finite", {}).values() for i in found}
    if not positions:
        return ""
    return f"{len(positions)} image{'s' if len(positions) > 1 else ''} met NaN or Inf"


def cell(row: Row | None) -> str:
    """A number with its interval, its attack and its images."""
    if row is None:
        return "not measured"
    attack = "" if row["attack"]["name"] == "none" else attack_text(row["attack"])
    draws = f"mean of {row['draws']} draws" if row.get("draws") else ""
    # the column says so already
    about = [attack.removeprefix("AutoAttack "), f"n={row['images']['n']}", draws, finding(row)]
    return f"{accuracy_text(row)} ({', '.join(filter(None, about))})"


# Which rows are quoted.


def pick(rows: Iterable[Row]) -> Row | None:
    """Of one attack against one threat model, the row to quote.

    PGD: of the most images, then with the most steps in all. AutoAttack: standard before rand
    before quick, then of the most images. Of equals the latest.
    """

    def rank(row: Row) -> tuple[float, ...]:
        attack, n = row["attack"], row["images"]["n"]
        if attack["name"] == "autoattack":
            version = attack.get("version")
            return (_VERSIONS.index(version) if version in _VERSIONS else -1, n)
        if attack["name"] == "certify":
            return (n, attack["n"])
        return (n, attack.get("num_steps", 0) * attack.get("restarts", 1))

    return max(reversed(list(rows)), key=rank, default=None)


@dataclass(frozen=True)
class Quoted:
    """What is quoted of a run against one threat model on one set of images."""

    source: str
    threat: dict[str, Any] | None
    clean: Row | None
    pgd: Row | None
    autoattack: Row | None
    certified: tuple[Row, dict[str, Any]] | None  # the row, and its point of that radius

    @property
    def rows(self) -> list[Row]:
        return [row for row in (self.clean, self.pgd, self.autoattack) if row is not None]


def image_set(row: Row) -> tuple[str, str | None]:
    """What rows have in common whose images are the first of one list."""
    return source_text(row["images"]), row["images"].get("first")


def quoted(run: Run) -> list[Quoted]:
    """One entry a set of images and threat model, in the order that they were measured in.

    A certificate of radius eps stands beside attacks of that eps in L2; where there is none, at
    its smallest radius. Clean accuracy stands in each entry, and alone if nothing else is there.
    """
    rows = run.of("accuracy") + run.of("certificate")
    found = []
    for source, first in dict.fromkeys(map(image_set, rows)):
        own = [row for row in rows if image_set(row) == (source, first)]
        clean = pick(row for row in own if row["attack"]["name"] == "none")
        certificate = pick(row for row in own if row["purpose"] == "certificate")
        threats: list[dict[str, Any] | None] = _unique(
            row["threat_model"]
            for row in own
            if row.get("threat_model") and row["purpose"] == "accuracy"
        )
        points = {p["radius"]: p for p in known_points(certificate) if p["radius"] > 0}
        if points and not any(_l2_radius(t) in points for t in threats):
            threats.append({"norm": "l2", "eps": min(points)})
        for threat in threats or [None]:
            against = [row for row in own if threat and row.get("threat_model") == threat]
            point = points.get(_l2_radius(threat))
            found.append(
                Quoted(
                    source,
                    threat,
                    clean,
                    pick(row for row in against if row["attack"]["name"] in ("pgd", "apgd")),
                    pick(row for row in against if row["attack"]["name"] == "autoattack"),
                    (certificate, point) if certificate and point else None,
                )
            )
    return found


def known_points(certificate: Row | None) -> list[dict[str, Any]]:
    """Certified accuracy at the radii that its samples could reach."""
    points = [] if certificate is None else certificate.get("radii", [])
    return [point for point in points if point.get("reachable", True)]


def _l2_radius(threat: dict[str, Any] | None) -> float | None:
    return threat["eps"] if threat and threat.get("norm") == "l2" else None


def _unique(values: Iterable[dict[str, Any]]) -> list[dict[str, Any] | None]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def same_attack(row: Row, rows: Iterable[Row]) -> Row | None:
    """Of these rows, that with the row's attack, settings and threat model; of the most images."""
    return pick(
        other
        for other in rows
        if other["attack"] == row["attack"] and other.get("threat_model") == row.get("threat_model")
    )


def difference(one: Row, other: Row) -> tuple[float, float, float]:
    """Accuracy of one less that of another on other images, and its 95% interval.

    Newcombe's interval (1998, method 10), from both Wilson intervals.
    """
    p, q = one["accuracy"], other["accuracy"]
    (p_low, p_high), (q_low, q_high) = one["interval"], other["interval"]
    low = p - q - math.hypot(p - p_low, q_high - q)
    high = p - q + math.hypot(p_high - p, q - q_low)
    return p - q, low, high
