"""Which of a column's numbers are classes, and what is said of rows that have none."""

import datasets
import numpy as np
import torch
from torch import Tensor

from robust_accel.data.decoding import SKIP

_SURELY = 1000  # labels below are classes, wherever the others are


def class_names(rows: datasets.Dataset, column: str) -> tuple[str, ...] | None:
    """Of a column of class labels; of plain integers None."""
    names = getattr(rows.features[column], "names", None)
    return tuple(names) if names else None


def number_of_classes(rows: datasets.Dataset, column: str, num_classes: int | None = None) -> int:
    """How many classes a column tells: a stray integer makes no model of two million outputs.

    Args:
        num_classes: Plain integers below are classes. Not given: those below 1000, or at least
            half of the numbers up to which occur.
    """
    if names := class_names(rows, column):
        return len(names)
    values, missing = _integers(rows, column)
    present = np.unique(values[~missing & (values >= 0)])
    known = present < (num_classes or _SURELY)
    if num_classes is None:
        known |= 2 * np.arange(1, len(present) + 1) > present
    return int(present[known].max(initial=-1)) + 1


def labels_of(
    rows: datasets.Dataset,
    column: str,
    number: int,
    where: str,
    *,
    lowest: int = 0,
    skip: bool = False,
) -> tuple[Tensor, dict[int, str]]:
    """A column of labels, int64 [N], and which rows have none of a class, and why.

    Args:
        number: Of classes.
        where: The rows in words.
        lowest: Label that is allowed.
        skip: Do not refuse such rows.

    Raises:
        ValueError: ``label_column: ...``: the first such row; with ``skip``, if all are.
    """
    values, missing = _integers(rows, column)
    wrong = np.flatnonzero(missing | (values < lowest) | (values >= number))
    allowed = f"0 to {number - 1}" if number else "integers from 0 on"
    allowed += f", and {lowest} for none" if lowest < 0 else ""
    sparse = "" if class_names(rows, column) or lowest < 0 else " (or model.num_classes)"
    bad = {}
    for row in map(int, wrong):
        has = f"the label {rows.data.column(column)[row]}, allowed are {allowed}"
        has += sparse if values[row] >= number else ""
        bad[row] = f"row {row} of {where} has {'no label' if missing[row] else has}"
    if bad and (not skip or len(bad) == len(values)):
        more = f" ({len(bad)} such rows)" if len(bad) > 1 else ""
        raise ValueError(f"label_column: {column!r}: {next(iter(bad.values()))}{more}; {SKIP}")
    return torch.from_numpy(values), bad


def _integers(rows: datasets.Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N], where a larger number is the largest, and where there is none."""
    found = rows.data.column(column)
    values = found.fill_null(0).to_numpy()
    if values.dtype == np.uint64:
        values = np.minimum(values, np.uint64(2**63 - 1))
    return values.astype(np.int64), found.is_null().to_numpy()
