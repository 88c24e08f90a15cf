"""Which of a column's numbers are classes, and what is said of rows that have none."""

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from robust_accel.data.decoding import SKIP
from robust_accel.data.shards import PLACE

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
    values, missing = _integers(rows.data.column(column))
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
    """See ``checked_labels``: a column of labels."""
    named = class_names(rows, column) or lowest < 0
    found, key = rows.data.column(column), f"label_column: {column!r}"
    about: Any = {"lowest": lowest, "more": "" if named else " (or model.num_classes)"}
    if PLACE in rows.features:  # the sample's name, for there may be millions
        about["told"] = lambda row: f" ({rows.data.column('image')[row].as_py()['path']})"
    return checked_labels(found, number, key, where, skip=skip, **about)


def checked_labels(
    found: pa.ChunkedArray,
    number: int,
    key: str,
    where: str,
    *,
    lowest: int = 0,
    more: str = "",
    skip: bool = False,
    told: Callable[[int], str] = lambda _: "",
) -> tuple[Tensor, dict[int, str]]:
    """Labels, int64 [N], and which rows have none of a class, and why.

    Args:
        found: Integers, [N].
        number: Of classes.
        key: Of errors.
        where: The rows in words.
        lowest: Label that is allowed.
        more: What else would be allowed.
        skip: Do not refuse such rows.
        told: What else to say of a row.

    Raises:
        ValueError: ``key: ...``: the first such row; with ``skip``, if all are.
    """
    values, missing = _integers(found)
    wrong = np.flatnonzero(missing | (values < lowest) | (values >= number))
    allowed = f"0 to {number - 1}" if number else "integers from 0 on"
    allowed += f", and {lowest} for none" if lowest < 0 else ""
    bad = {}
    for row in map(int, wrong):
        has = f"the label {found[row]}, allowed are {allowed}"
        has += more if values[row] >= number else ""
        bad[row] = f"row {row} of {where}{told(row)} has {'no label' if missing[row] else has}"
    if bad and (not skip or len(bad) == len(values)):
        others = f" ({len(bad)} such rows)" if len(bad) > 1 else ""
        raise ValueError(f"{key}: {next(iter(bad.values()))}{others}" + f"; {SKIP}" * (not skip))
    return torch.from_numpy(values), bad


def _integers(found: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N], where a larger number is the largest, and where there is none."""
    values = found.fill_null(0).to_numpy()
    if values.dtype == np.uint64:
        values = np.minimum(values, np.uint64(2**63 - 1))
    return values.astype(np.int64), found.is_null().to_numpy()
