"""Exports of runs to files that the user names: CSV of every row, LaTeX of the comparison."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

from robust_accel.reporting.tables import Table
from robust_accel.reporting.views import Run


def csv(runs: Sequence[Run]) -> str:
    """A line a row, a column for whatever any row has: nested keys dotted, lists as JSON.

    ``accuracy_percent`` and its ``interval_low_percent`` and ``interval_high_percent`` stand for
    ``accuracy`` and ``interval`` and are not rounded. Text that a spreadsheet would take for a
    formula gets an apostrophe.
    """
    lines = []
    for run in runs:
        for row in run.rows:
            row = dict(row)
            numbers = {"accuracy_percent": row.pop("accuracy", None)}
            low, high = row.pop("interval", None) or (None, None)
            numbers |= {"interval_low_percent": low, "interval_high_percent": high}
            shares = {key: 100 * value for key, value in numbers.items() if value is not None}
            cells = {"run": run.name} | shares | _cells(row)
            lines.append({_no_formula(key): _no_formula(value) for key, value in cells.items()})
    return pandas.DataFrame(lines, dtype=object).to_csv(index=False, lineterminator="\n")


def _cells(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            cells |= _cells(value, f"{prefix}{key}.")
        elif value is not None:
            cells[prefix + key] = json.dumps(value) if isinstance(value, list) else value
    return cells


def _no_formula(cell: Any) -> Any:
    """A spreadsheet executes text that begins so; behind an apostrophe it shows it."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(tuple("=+-@\t\r")) else cell


def latex(table: Table) -> str:
    """A booktabs table (``\\usepackage{booktabs}``), all its text escaped."""
    frame = pandas.DataFrame(table.rows, columns=list(table.head))
    text = frame.style.format(escape="latex").format_index(escape="latex", axis=1).hide(axis=0)
    return text.to_latex(hrules=True, column_format="l" * len(table.head))


def check_export(option: str, path: Path, suffix: str) -> None:
    """Raise ValueError unless this is a file of the kind to be written, where one can be.

    A file of that kind is replaced, as the user named it, and so is a link: it is not followed.
    Anything else is no export of ours.
    """
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"{option}: {path} is no file {suffix}: name one to write (or replace)")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.parent}")
