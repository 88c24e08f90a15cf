"""Which columns of a split are its images and labels, and what is in them."""

from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from torch import Tensor

from robust_accel.data.classes import Classes, renumbered_labels, tell
from robust_accel.data.decoding import Pictures, Source
from robust_accel.data.labels import class_names, labels_of, number_of_classes
from robust_accel.data.settings import DataSettings
from robust_accel.data.sources import rows_of


@dataclass(frozen=True)
class LabeledRows:
    """Images of a split that are not decoded yet, and their labels.

    Attributes:
        source: Of the images: all rows of the split.
        numbers: Rows of the split: [N].
        labels: Of these rows: [N].
        classes: Of the split, or of the data set.
        bad: Rows that ``data.on_bad`` leaves out for their labels, and why.
    """

    source: Source
    numbers: Tensor
    labels: Tensor
    classes: Classes
    bad: dict[int, str]

    @property
    def pictures(self) -> Pictures:
        return Pictures.of(self.source, self.numbers)

    def select(self, indices: Tensor) -> "LabeledRows":
        return replace(self, numbers=self.numbers[indices], labels=self.labels[indices])

    def listed(self, numbers: Tensor) -> "LabeledRows":
        """Rows by their numbers in the split, in this order."""
        place = torch.full((len(self.source),), -1)
        place[self.numbers] = torch.arange(len(self.numbers))
        found = place[numbers]
        bad = {row: self.bad[row] for row in numbers[found < 0].tolist()}
        return replace(self.select(found[found >= 0]), bad=bad)

    def of_classes(self, classes: tuple[int, ...] | None) -> "LabeledRows":
        """The rows of some classes, which are numbered anew.

        Raises:
            ValueError: ``classes: ...``: there are no such classes, or no image of them.
        """
        if classes is None:
            return self
        named = self.classes.chosen(classes)
        rows = self.select(torch.isin(self.labels, torch.tensor(classes)).nonzero().flatten())
        if len(rows.numbers) == 0:
            raise ValueError(f"classes: {named.where} has no image of {list(classes)}")
        number = torch.zeros(self.classes.number, dtype=torch.int64)
        number[list(classes)] = torch.arange(len(classes))
        return replace(rows, labels=number[rows.labels], classes=named)

    def in_classes_of(self, train: Classes) -> "LabeledRows":
        """The same rows, labelled by the class numbers of the training split.

        Raises:
            ValueError: ``test_split: ...``: classes that the training split has not.
        """
        where = self.classes.where
        if self.classes.names is None and train.names is None:
            number = max(self.classes.number, train.number)
            return replace(self, classes=Classes(number, None, where))
        try:
            positions, doubt = self.classes.positions_in(train)
        except ValueError as error:
            raise ValueError(f"test_split: {error}") from None
        if doubt and (self.classes.named or train.named):
            tell(doubt)
        labels = renumbered_labels(self.labels, positions)
        return replace(self, labels=labels, classes=Classes(train.number, train.names, where))


def labeled_rows(
    splits: datasets.DatasetDict,
    settings: DataSettings,
    key: str,
    *,
    num_classes: int | None = None,
    known: int = 0,
) -> LabeledRows:
    """The split that a key of the settings names.

    Args:
        num_classes: See ``number_of_classes``.
        known: Classes that another split tells.

    Raises:
        ValueError: ``key: ...``: no such split, columns, or labels that are none.
    """
    split = getattr(settings, key)
    rows = rows_of(splits, split, key, settings.path)
    where = f"split {split} of {settings.path}"
    image_column = find_image_column(rows, settings.image_column)
    column = find_label_column(rows, settings.label_column)
    names = class_names(rows, column)
    number = number_of_classes(rows, column, num_classes)
    number = number if names else max(number, known)
    labels, bad = labels_of(rows, column, number, where, skip=settings.on_bad == "skip")
    numbers = torch.tensor([i for i in range(len(rows)) if i not in bad])
    classes = Classes(number, names, where)
    return LabeledRows(Source(rows, image_column, where), numbers, labels[numbers], classes, bad)


def classes_of_train(
    splits: datasets.DatasetDict, settings: DataSettings, num_classes: int | None = None
) -> Classes | None:
    """The classes of the training split; None if there is none, or they cannot be told."""
    rows = splits.get(settings.train_split)
    if rows is None or len(rows) == 0:
        return None
    try:
        column = find_label_column(rows, settings.label_column)
    except ValueError:  # evaluation does not need that split
        return None
    number = number_of_classes(rows, column, num_classes)
    where = f"split {settings.train_split} of {settings.path}"
    return Classes(number, class_names(rows, column), where)


def find_image_column(rows: datasets.Dataset, given: str | None) -> str:
    """The column of images: as given, else by its feature type."""
    images = [n for n, f in rows.features.items() if isinstance(f, datasets.Image)]
    return _choose("image_column", given, images, images, rows.features)


def find_label_column(rows: datasets.Dataset, given: str | None) -> str:
    """The column of labels: as given, else by feature type and name."""
    features: dict[str, Any] = rows.features
    scalars = {n: f for n, f in features.items() if isinstance(f, datasets.Value)}
    classes = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    integers = [n for n, f in scalars.items() if "int" in f.dtype]
    labels = classes or [n for n in integers if "label" in n] or integers
    return _choose("label_column", given, labels, classes + integers, features)


def _choose(
    key: str, given: str | None, found: list[str], allowed: list[str], features: dict[str, Any]
) -> str:
    kind = "images" if key == "image_column" else "integers"
    if given is not None and given not in features:
        raise ValueError(f"{key}: there is no column {given!r}; columns are {list(features)}")
    if given is not None and given not in allowed:
        raise ValueError(f"{key}: {given!r} holds no {kind}: {features[given]}")
    if given is None and len(found) != 1:
        types = {n: getattr(f, "dtype", type(f).__name__) for n, f in features.items()}
        raise ValueError(
            f"{key}: name the column; {found or f'none holds {kind} and'} would do, columns are "
            + ", ".join(f"{name} ({dtype})" for name, dtype in types.items())
            + " (folders are classes if all images lie in SPLIT/CLASS)" * (list(types) == ["image"])
        )
    return found[0] if given is None else given
