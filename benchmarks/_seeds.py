"""What benchmarks share that compare runs seed by seed: a table of accuracies and differences."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from robust_accel.reporting.views import pick
from robust_accel.statistics import paired_difference

MEASURES = {"clean": "none", "PGD-20": "pgd"}  # by the attack's name in a report's rows
Reports = Mapping[str, Mapping[int, dict[str, Any]]]
"""Name of a run -> seed -> its report."""


def accuracy_table(reports: Reports, baseline: str) -> list[list[str]]:
    """Header and rows: mean accuracies, and paired differences to one of the runs."""
    header = ["run", "seeds", *(f"{m} (%)" for m in MEASURES)]
    header += [f"{m} - {baseline} [95%]" for m in MEASURES]
    return [header] + [
        _row(name, runs, {} if name == baseline else reports.get(baseline, {}))
        for name, runs in reports.items()
        if runs
    ]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, its first row the header."""
    header, *rest = rows
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rest]
    )


def _row(name: str, runs: Mapping[int, Any], baseline: Mapping[int, Any]) -> list[str]:
    row = [name, str(len(runs))]
    row += [f"{fmean(_percent(r, m) for r in runs.values()):.2f}" for m in MEASURES.values()]
    pairs = sorted(runs.keys() & baseline.keys())
    for measure in MEASURES.values():
        if len(pairs) < 2:
            row.append("")
            continue
        d = paired_difference(
            [_percent(runs[seed], measure) for seed in pairs],
            [_percent(baseline[seed], measure) for seed in pairs],
        )
        row.append(f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]")
    return row


def row_of(report: dict[str, Any], attack: str) -> dict[str, Any] | None:
    """What a report says of test images under an attack."""
    rows = [row for row in report.get("measurements", []) if row["purpose"] == "accuracy"]
    return pick(row for row in rows if row["attack"]["name"] == attack)


def _percent(report: dict[str, Any], measure: str) -> float:
    row = row_of(report, measure)
    assert row is not None
    return 100 * row["accuracy"]
