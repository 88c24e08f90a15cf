"""The images that ``data.unlabeled`` means, and the labels that some of them have."""

from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor

from robust_accel.data.array_files import holds_arrays
from robust_accel.data.array_images import images_of_arrays, images_of_pickle
from robust_accel.data.classes import Classes, renumbered_labels, tell
from robust_accel.data.columns import find_image_column, find_label_column
from robust_accel.data.decoding import Pictures, Source
from robust_accel.data.images import NO_LABEL, ImageSet, derived_seed
from robust_accel.data.labels import class_names, labels_of
from robust_accel.data.reading import LeftOut, by, drawn, read_images
from robust_accel.data.settings import DataSettings, UnlabeledSettings
from robust_accel.data.sources import load_splits, rows_of

PSEUDO_LABEL, CONFIDENCE = "pseudo_label", "confidence"  # columns that `pseudo-label` writes
LABELED_FILES = (".parquet", ".npz")  # and the files
NONE_LEFT_OUT = "path: not given, and data.train_size leaves no image out"
_OF_ROWS = ("config", "split", "image_column", "label_column", "min_confidence")


def load_unlabeled(
    own: UnlabeledSettings,
    settings: DataSettings,
    train: ImageSet,
    rest: ImageSet,
    classes: Classes,
    seed: int,
    *,
    number: int = 0,
    key: str = "unlabeled",
) -> tuple[ImageSet, LeftOut | None]:
    """Images that ``data.unlabeled`` names, decoded and augmented as ``data`` says.

    Args:
        train: Which they go with.
        rest: What ``data.train_size`` leaves out.
        classes: Of the data set.
        number: Of several such sources, from 0 on.
        key: What errors begin with.

    Raises:
        ValueError: ``unlabeled.key: ...``.
    """
    # other crops than the labelled images', and than another source's
    seed = derived_seed(seed, 8, number)
    try:
        images, left_out = _read(own, settings, rest, classes, seed)
        images, _ = drawn(images, own.size, "size")
        if images.shape != train.shape:
            raise ValueError(
                f"path: the unlabelled images are {by(images.shape)}, the labelled ones "
                f"{by(train.shape)}"
            )
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from error
    return images, left_out


def rows_to_label(own: UnlabeledSettings, on_bad: str) -> tuple[datasets.Dataset, str, str]:
    """Rows that ``data.unlabeled.path`` names, their image column, and both in words."""
    assert own.path is not None
    rows = rows_of(load_splits(own.path, own.config, on_bad), own.split, "split", own.path)
    return rows, find_image_column(rows, own.image_column), f"split {own.split} of {own.path}"


def _read(
    own: UnlabeledSettings, settings: DataSettings, rest: ImageSet, classes: Classes, seed: int
) -> tuple[ImageSet, LeftOut | None]:
    path = own.path
    if path is None:
        own.refuse(_OF_ROWS, "what data.train_size leaves out, whose labels stay unseen")
        if len(rest) == 0:
            raise ValueError(NONE_LEFT_OUT)
        rest.labels = torch.full((len(rest),), NO_LABEL)
        return rest, None
    if Path(path).suffix in (".pickle", ".pkl"):
        own.refuse(_OF_ROWS, f"a pickle as {path}")
        return images_of_pickle(path, settings, seed, classes.number)
    if holds_arrays(path, own.image_column):
        return images_of_arrays(path, own, settings, seed, classes), None
    rows, image_column, where = rows_to_label(own, settings.on_bad)
    labels = torch.full((len(rows),), NO_LABEL)
    bad: dict[int, str] = {}
    column = own.label_column or (PSEUDO_LABEL if PSEUDO_LABEL in rows.features else None)
    if column is not None:
        labels, bad = _labels(rows, find_label_column(rows, column), where, settings, classes)
    confident = _confident(rows, own.min_confidence, path).tolist()
    numbers = torch.tensor([row for row in confident if row not in bad], dtype=torch.int64)
    bad = {row: bad[row] for row in confident if row in bad}
    if len(numbers) == 0:
        raise ValueError(f"path: no image of {where} is left: {next(iter(bad.values()))}")
    pictures = Pictures.of(Source(rows, image_column, where), numbers)
    read = read_images(pictures, labels[numbers], settings, seed, bad)
    return read.images, read.left_out


def _confident(rows: datasets.Dataset, least: float, path: str) -> Tensor:
    """The rows whose teacher was that sure."""
    if least <= 0:
        return torch.arange(len(rows))
    if CONFIDENCE not in rows.features:
        raise ValueError(
            f"min_confidence: {path} has no column {CONFIDENCE!r}; columns are {rows.column_names}"
        )
    confident = np.asarray(rows[CONFIDENCE][:]) >= least
    if not confident.any():
        raise ValueError(f"min_confidence: no image of {path} has {least:g}")
    return torch.from_numpy(np.flatnonzero(confident))


def _labels(
    rows: datasets.Dataset, column: str, where: str, settings: DataSettings, train: Classes
) -> tuple[Tensor, dict[int, str]]:
    """A column of labels in the numbers of the training data's classes, found by name."""
    names = class_names(rows, column)
    number = len(names) if names else train.number
    own = Classes(number, names, f"column {column!r} of {where}")
    try:
        positions, doubt = own.positions_in(train)
    except ValueError as error:
        raise ValueError(f"label_column: {error}") from None
    if column == PSEUDO_LABEL and not own.named:
        doubt = ""  # its numbers are those of the classes that the teacher was trained on
    if doubt and settings.classes is not None:
        raise ValueError(
            f"label_column: {own.where} gives numbers, but data.classes numbers classes anew, and "
            "without names on both sides it cannot be told which class is meant"
        )
    if doubt and (own.named or train.named):
        tell(doubt)
    skip = settings.on_bad == "skip"
    labels, bad = labels_of(rows, column, number, where, lowest=NO_LABEL, skip=skip)
    kept = torch.tensor([row not in bad for row in range(len(rows))])
    return renumbered_labels(torch.where(kept, labels, NO_LABEL), positions), bad
