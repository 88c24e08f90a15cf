"""From a hub, a folder or parquet to the splits of a data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import torch
from torch import Tensor

from robust_accel.data.classes import check_classes, tell
from robust_accel.data.columns import LabeledRows, classes_of_train, labeled_rows
from robust_accel.data.decoding import Pictures, Source
from robust_accel.data.ids import Ids, IdsError, find_rows, list_text
from robust_accel.data.images import NO_LABEL, FileImages, ImageSet, MemoryImages
from robust_accel.data.reading import (
    LeftOut,
    by,
    drawn,
    drawn_order,
    held_out,
    read_drawn,
    read_images,
)
from robust_accel.data.settings import DataSettings, UnlabeledSettings
from robust_accel.data.shards import PLACE, shards_of
from robust_accel.data.sources import load_splits, rows_of
from robust_accel.data.stored import StoredImages, labels_among
from robust_accel.data.unlabeled import NONE_LEFT_OUT, load_unlabeled, rows_to_label

DataIdentity = dict[str, dict[str, Any]]
"""Of each set that is not empty, how many ``images`` it has and their ``digest``; and of training
images that lie in ``shards`` the digests of these, by name."""


@dataclass(frozen=True)
class Data:
    """The splits of a data set; ``validation`` is held out of train, ``test`` only measured."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    num_classes: int
    unlabeled: ImageSet | None = None
    """To be mixed into each batch; pooled images are in ``train``."""
    class_names: tuple[str, ...] | None = None
    """By label; None where the label column is of plain integers."""
    selection: str = "all"
    """Which images of the test split ``test`` is, see ``EvaluationImages``."""
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    """By ``train``, ``test`` and ``unlabeled``, where ``data.on_bad: skip`` left images out."""
    further: tuple[ImageSet, ...] = ()
    """To be mixed in as ``unlabeled`` is: the second source and those after it."""
    shards: Mapping[str, str] = field(default_factory=dict)
    """Of the training split, see ``shards_of``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.train.shape

    @property
    def all_labeled(self) -> bool:
        """Whether every image to train on has a label, its own or a teacher's."""
        sets = (self.train, *self.mixed_in)
        return not any(NO_LABEL in labels_among(images) for images in sets)

    @property
    def mixed_in(self) -> tuple[ImageSet, ...]:
        """What is mixed into each batch, source by source."""
        return () if self.unlabeled is None else (self.unlabeled, *self.further)

    def identity(self) -> DataIdentity:
        """Of what training sees: ``unlabeled.1`` is the second source that is mixed in."""
        mixed_in = {_name(i): images for i, images in enumerate(self.mixed_in)}
        found = identity_of(train=self.train, validation=self.validation, **mixed_in)
        if self.shards:
            found["train"]["shards"] = dict(self.shards)
        return found


@dataclass(frozen=True)
class EvaluationImages:
    """Images to measure.

    Attributes:
        images: Labelled by the classes of the training split, where the data set has one.
        num_classes: Of the data set.
        class_names: By label; None where the label column is of plain integers.
        selection: Which images of the test split these are: ``all``, ``ids of NAME (DIGEST)``,
            ``5 listed ids (DIGEST)`` or ``5 drawn by a fixed seed``; ``, 1 bad left out``.
    """

    images: ImageSet
    num_classes: int
    class_names: tuple[str, ...] | None
    selection: str
    left_out: LeftOut | None = None


def identity_of(**sets: ImageSet | None) -> DataIdentity:
    """What tells sets, by their names, from others: their images, labels and order."""
    return {
        name: {"images": len(images), "digest": images.digest()}
        for name, images in sets.items()
        if isinstance(images, MemoryImages | FileImages | StoredImages) and len(images) > 0
    }


def load_data(
    settings: DataSettings, *, seed: int = 0, ids: Ids = None, num_classes: int | None = None
) -> Data:
    """Load and check all splits.

    Args:
        num_classes: Plain integers below are classes, see ``number_of_classes``.
        ids: The images of the test split, see ``load_test``.

    Raises:
        ValueError: ``key: what was found, what is allowed`` for a path, split, column or image
            that is not as declared.
    """
    splits = load_splits(settings.path, settings.config, settings.on_bad)
    if settings.test_split == settings.train_split:
        tell(
            f"data.test_split: {settings.test_split} is what is trained on: what is measured on it "
            "says little about other images"
        )
    rows = labeled_rows(splits, settings, "train_split", num_classes=num_classes)
    test_rows = labeled_rows(
        splits, settings, "test_split", num_classes=num_classes, known=rows.classes.number
    ).in_classes_of(rows.classes)
    number = test_rows.classes.number  # of plain integers, the test split may have more
    rows = replace(rows, classes=replace(rows.classes, number=number)).of_classes(settings.classes)
    classes = rows.classes
    train, rest, train_left_out = read_drawn(
        rows.pictures,
        rows.labels,
        settings,
        seed,
        rows.bad,
        size=settings.train_size,
        key="train_size",
        rest=any(own.path is None for own in settings.extra),
    )
    test = _test(test_rows, settings, ids, seed)
    if train.shape != test.images.shape:
        raise ValueError(
            f"path: images of split {settings.train_split} are {by(train.shape)}, of split "
            f"{settings.test_split} {by(test.images.shape)}"
        )
    train, validation = held_out(train, settings.validation_size)
    mixed_in, left_out = [], {"train": train_left_out, "test": test.left_out}
    for i, own in enumerate(settings.extra):
        key = f"unlabeled.{i}" if isinstance(settings.unlabeled, tuple) else "unlabeled"
        _check_apart(own, settings, key)
        images, left_out[_name(i)] = load_unlabeled(
            own, settings, train, rest, classes, seed, number=i, key=key
        )
        mixed_in.append(images)
    among = {label for images in mixed_in for label in labels_among(images)}
    check_classes(train.labels, classes, also=torch.tensor(sorted(among)))
    if mixed_in and settings.extra[0].fraction is None:
        train, mixed_in = train.pooled(mixed_in[0]), []
    return Data(
        train,
        validation,
        test.images,
        classes.number,
        mixed_in[0] if mixed_in else None,
        classes.names,
        test.selection,
        {name: found for name, found in left_out.items() if found is not None},
        tuple(mixed_in[1:]),
        shards_of(splits[settings.train_split]),
    )


def _check_apart(own: UnlabeledSettings, settings: DataSettings, key: str) -> None:
    """Refuse a source that has the images held out; say of one that it has the test images."""
    if (own.path, own.config) != (settings.path, settings.config):
        return
    if own.split == settings.train_split and settings.validation_size:
        raise ValueError(
            f"{key}.split: {own.split} of {own.path} has the images that data.validation_size "
            f"holds out as well: leave {key}.path out for those that data.train_size leaves over"
        )
    if own.split == settings.test_split:
        tell(
            f"data.{key}: {own.split} of {own.path} are the test images: what is measured on them "
            "says little about other images"
        )


def _name(number: int) -> str:
    """Of a source that is mixed in."""
    return f"unlabeled.{number}" if number else "unlabeled"


def load_test(
    settings: DataSettings, *, ids: Ids = None, num_classes: int | None = None
) -> EvaluationImages:
    """The test split alone, for evaluation.

    Args:
        num_classes: As of ``load_data``.
        ids: Measure these images only, in their order: row numbers of the test split; or the path
            of a text file with one image a line, a row number or a file name (of the file that the
            image lies in, or that the data set remembers); or ``robustbench/imagenet5000``.

    Raises:
        ValueError: As ``load_data``; an ``IdsError`` where ``ids`` are not to be had.
    """
    splits = load_splits(settings.path, settings.config, settings.on_bad)
    train = classes_of_train(splits, settings, num_classes)
    known = train.number if train else 0
    rows = labeled_rows(splits, settings, "test_split", num_classes=num_classes, known=known)
    if train is not None:
        rows = rows.in_classes_of(train)
    return _test(rows, settings, ids, 0)


def _test(rows: LabeledRows, settings: DataSettings, ids: Ids, seed: int) -> EvaluationImages:
    if ids is not None:
        rows = _listed(rows, settings, ids)
    rows = rows.of_classes(settings.classes)
    images, _, left_out = read_drawn(
        rows.pictures, rows.labels, settings, seed, rows.bad,
        size=settings.test_size, key="test_size",
    )  # fmt: skip
    selection = selection_of(settings, ids)
    if left_out is not None:
        selection += f", {left_out.images} bad left out"
    return EvaluationImages(images, rows.classes.number, rows.classes.names, selection, left_out)


def selection_of(settings: DataSettings, ids: Ids) -> str:
    """Which images of the test split are asked for, in words, see ``EvaluationImages``.

    Raises:
        IdsError: The list is not to be had.
    """
    if ids is not None:
        return list_text(ids)
    size = settings.test_size
    return "all" if size is None else f"{size} drawn by a fixed seed"


def _listed(rows: LabeledRows, settings: DataSettings, ids: str | Sequence[int]) -> LabeledRows:
    if settings.test_size is not None:
        raise IdsError(
            f"ids: these and data.test_size {settings.test_size} both choose test images: give one"
        )
    rows = rows.listed(find_rows(ids, len(rows.source), rows.source.paths, rows.classes.where))
    if settings.classes is not None:
        other = ~torch.isin(rows.labels, torch.tensor(settings.classes))
        if other.any():
            raise IdsError(
                f"ids: row {int(rows.numbers[other][0])} is of class {int(rows.labels[other][0])}, "
                f"which data.classes {list(settings.classes)} leaves out"
            )
    return rows


def load_to_label(
    settings: DataSettings, *, num_classes: int | None = None
) -> tuple[datasets.Dataset, ImageSet]:
    """The images that ``data.unlabeled`` means, as rows of one column and as an image set.

    Args:
        num_classes: As of ``load_data``: the same images are left out as in training.

    Raises:
        ValueError: As ``load_data``; also for pickles, arrays and shards, which have no such rows.
    """
    if len(settings.extra) > 1:
        raise ValueError(f"unlabeled: one set is labelled at a time, found {len(settings.extra)}")
    own = next(iter(settings.extra), UnlabeledSettings())
    plain = settings.model_copy(update={"augment": "none"})
    rows, images = _left_out(plain, num_classes) if own.path is None else _to_label(own, plain)
    if own.size is not None:
        images, _ = drawn(images, own.size, "unlabeled.size")
        rows = rows.select(drawn_order(len(rows))[: own.size])
    return rows, images


def _to_label(own: UnlabeledSettings, plain: DataSettings) -> tuple[datasets.Dataset, ImageSet]:
    try:
        rows, column, where = rows_to_label(own, plain.on_bad)
        _check_rows(rows)
        numbers = torch.arange(len(rows))
        pictures = Pictures.of(Source(rows, column, where), numbers)
        read = read_images(pictures, torch.full_like(numbers, NO_LABEL), plain, 0)
    except ValueError as error:
        raise ValueError(f"unlabeled.{error}") from error
    return _one_column(rows, column, numbers[read.kept]), read.images


def _left_out(settings: DataSettings, num_classes: int | None) -> tuple[datasets.Dataset, ImageSet]:
    """What ``train_size`` leaves out of the training split."""
    splits = load_splits(settings.path, settings.config, settings.on_bad)
    rows = labeled_rows(splits, settings, "train_split", num_classes=num_classes)
    rows = rows.of_classes(settings.classes)
    all_rows = rows_of(splits, settings.train_split, "train_split", settings.path)
    _check_rows(all_rows)
    read = read_images(rows.pictures, rows.labels, settings, 0, rows.bad)
    rest = drawn_order(len(read.images))[settings.train_size :]
    if settings.train_size is None or len(rest) == 0:
        raise ValueError(f"unlabeled.{NONE_LEFT_OUT}")
    images = read.images.subset(rest)
    images.labels = torch.full((len(rest),), NO_LABEL)
    return _one_column(all_rows, rows.source.column, rows.numbers[read.kept][rest]), images


def _check_rows(rows: datasets.Dataset) -> None:
    if PLACE in rows.features:
        raise ValueError("path: images in shards are not written as parquet: unpack them first")


def _one_column(rows: datasets.Dataset, column: str, numbers: Tensor) -> datasets.Dataset:
    return rows.select_columns([column]).select(numbers)
