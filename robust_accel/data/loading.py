"""From a hub, a folder or parquet to the splits of a data set."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robust_accel.data.array_pickle import load_arrays
from robust_accel.data.images import (
    NO_LABEL,
    FileImages,
    ImageSet,
    MemoryImages,
    seeded_generator,
)
from robust_accel.data.settings import DataSettings, UnlabeledSettings

DIGITS = "sklearn:digits"
PSEUDO_LABEL, CONFIDENCE = "pseudo_label", "confidence"  # columns that `pseudo-label` writes


@dataclass(frozen=True)
class Data:
    """The splits of a data set; ``validation`` is held out of train, ``test`` only measured."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    num_classes: int
    unlabeled: ImageSet | None = None
    """To be mixed into each batch; pooled images are in ``train``."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.train.shape

    @property
    def all_labeled(self) -> bool:
        """Whether every image to train on has a label, its own or a teacher's."""
        sets = [images for images in (self.train, self.unlabeled) if images is not None]
        return not any(bool((images.labels == NO_LABEL).any()) for images in sets)


def load_data(settings: DataSettings, *, seed: int = 0) -> Data:
    """Load and check all splits.

    Raises:
        ValueError: ``key: what was found, what is allowed`` for a path, split, column or image
            that is not as declared.
    """
    splits = _load_splits(settings.path, settings.config)
    train, num_classes = _load_split(splits, settings, "train_split", seed)
    test, test_classes = _load_split(splits, settings, "test_split", seed)
    num_classes = max(num_classes, test_classes)
    if train.shape != test.shape:
        raise ValueError(
            f"path: images of split {settings.train_split} are {_by(train.shape)}, of split "
            f"{settings.test_split} {_by(test.shape)}"
        )
    train, rest = _drawn(train, settings.train_size, "train_size")
    test, _ = _drawn(test, settings.test_size, "test_size")
    train, validation = _hold_out(train, settings.validation_size)
    unlabeled = None
    if settings.unlabeled is not None:
        unlabeled = _load_unlabeled(settings.unlabeled, settings, rest, seed)
        _check_unlabeled(unlabeled, train, num_classes)
        if settings.unlabeled.fraction is None:
            train, unlabeled = train.pooled(unlabeled), None
    return Data(train, validation, test, num_classes, unlabeled)


def load_test(settings: DataSettings) -> tuple[ImageSet, int]:
    """The test split alone and its number of classes, for evaluation."""
    splits = _load_splits(settings.path, settings.config)
    images, num_classes = _load_split(splits, settings, "test_split", 0)
    return _drawn(images, settings.test_size, "test_size")[0], num_classes


def load_to_label(settings: DataSettings) -> tuple[datasets.Dataset, ImageSet]:
    """The images that ``data.unlabeled`` means, as rows of one column and as an image set.

    Raises:
        ValueError: As ``load_data``; also for a pickle, which has no rows.
    """
    own = settings.unlabeled or UnlabeledSettings()
    try:
        if own.path is None:
            rows = _rows_left_out(settings)
        else:
            rows = _rows(_load_splits(own.path, own.config), own.split, "split", own.path)
        column = _find_image_column(rows, own.image_column)
        rows = rows.select_columns([column])
        labels = torch.full((len(rows),), NO_LABEL)
        plain = settings.model_copy(update={"augment": "none"})
        images = _images(rows, column, labels, plain, 0, f"split {own.split} of {own.path}")
    except ValueError as error:
        raise ValueError(f"unlabeled.{error}") from error
    return rows, images


def _rows_left_out(settings: DataSettings) -> datasets.Dataset:
    """The rows of the training split that ``train_size`` leaves out, in `_drawn`'s order."""
    splits = _load_splits(settings.path, settings.config)
    rows = _rows(splits, settings.train_split, "train_split", settings.path)
    if settings.classes is not None:
        labels = _labels(rows, _find_label_column(rows, settings.label_column))
        rows = rows.select(torch.isin(labels, torch.tensor(settings.classes)).nonzero().flatten())
    left_out = _order(len(rows))[settings.train_size :]
    if settings.train_size is None or len(left_out) == 0:
        raise ValueError("path: not given, and data.train_size leaves no image out")
    return rows.select(left_out)


def _order(num_images: int) -> Tensor:
    """Which images ``train_size`` takes first: not to change with the seed of a run."""
    return torch.randperm(num_images, generator=seeded_generator(6))


def _drawn(images: ImageSet, size: int | None, key: str) -> tuple[ImageSet, ImageSet]:
    """So many images, and the rest."""
    if size is None:
        return images, images.subset(torch.arange(0))
    if size > len(images):
        raise ValueError(f"{key}: {size} exceeds the {len(images)} images there are")
    order = _order(len(images))
    return images.subset(order[:size]), images.subset(order[size:])


def _hold_out(images: ImageSet, size: float) -> tuple[ImageSet, ImageSet]:
    """Images to train on, and held-out ones: a number, or a share below 1."""
    num_held_out = round(size * len(images)) if 0 < size < 1 else int(size)
    if num_held_out >= len(images):
        raise ValueError(f"validation_size: {size} leaves none of {len(images)} images to train")
    if size and not num_held_out:
        raise ValueError(f"validation_size: {size} of {len(images)} images is not one image")
    order = torch.randperm(len(images), generator=seeded_generator(5))
    return images.subset(order[num_held_out:]), images.subset(order[:num_held_out])


def _load_splits(path: str, config: str | None) -> datasets.DatasetDict:
    try:
        if path == DIGITS:
            return _digits()
        if Path(path).suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=path)
        return datasets.load_dataset(path, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        local = "" if Path(path).exists() else " (no such local path, so the hub was asked)"
        raise ValueError(f"path: {path!r} cannot be loaded{local}: {error}") from error


def _rows(splits: datasets.DatasetDict, split: str, key: str, path: str) -> datasets.Dataset:
    if split not in splits:
        raise ValueError(f"{key}: {path} has no split {split!r}; it has {list(splits)}")
    if len(splits[split]) == 0:
        raise ValueError(f"path: split {split} of {path} holds no image")
    return splits[split]


def _load_split(
    splits: datasets.DatasetDict, settings: DataSettings, key: str, seed: int
) -> tuple[ImageSet, int]:
    """The split that a key of the settings names, and its number of classes."""
    split = getattr(settings, key)
    rows = _rows(splits, split, key, settings.path)
    image_column = _find_image_column(rows, settings.image_column)
    label_column = _find_label_column(rows, settings.label_column)
    labels = _labels(rows, label_column)
    low, high = (int(value) for value in labels.aminmax())
    num_classes = getattr(rows.features[label_column], "num_classes", None) or high + 1
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"label_column: {label_column!r} of split {split} holds labels from {low} to {high}, "
            f"allowed are 0 to {num_classes - 1}"
        )
    where = f"split {split} of {settings.path}"
    images = _images(rows, image_column, labels, settings, seed, where)
    if settings.classes is None:
        return images, num_classes
    if max(settings.classes) >= num_classes:
        raise ValueError(
            f"classes: {list(settings.classes)} is not allowed: {where} has the classes 0 to "
            f"{num_classes - 1}"
        )
    return _only(images, settings.classes), len(settings.classes)


def _only(images: ImageSet, classes: Sequence[int]) -> ImageSet:
    """The images of some classes, which are numbered anew."""
    number = torch.full((max(int(images.labels.max()), *classes) + 1,), NO_LABEL)
    number[list(classes)] = torch.arange(len(classes))
    images = images.subset((number[images.labels] != NO_LABEL).nonzero().flatten())
    images.labels = number[images.labels]
    return images


def _images(
    rows: datasets.Dataset,
    image_column: str,
    labels: Tensor,
    settings: DataSettings,
    seed: int,
    where: str,
) -> ImageSet:
    if not settings.in_memory:
        return FileImages(rows.select_columns([image_column]), labels, settings, seed)
    pixels = _decode(rows[image_column], where)
    return MemoryImages(pixels, labels, augment=settings.augment == "crop_flip", seed=seed)


def _load_unlabeled(
    own: UnlabeledSettings, settings: DataSettings, rest: ImageSet, seed: int
) -> ImageSet:
    """Images that ``data.unlabeled`` names, decoded and augmented as ``data`` says."""
    seed = seeded_generator(seed, 8).initial_seed()  # other crops than the labelled images'
    try:
        images = _read_unlabeled(own, settings, rest, seed)
        return _drawn(images, own.size, "size")[0]
    except ValueError as error:
        raise ValueError(f"unlabeled.{error}") from error


def _read_unlabeled(
    own: UnlabeledSettings, settings: DataSettings, rest: ImageSet, seed: int
) -> ImageSet:
    path = own.path
    if path is None:
        if len(rest) == 0:
            raise ValueError("path: not given, and data.train_size leaves no image out")
        rest.labels = torch.full((len(rest),), NO_LABEL)
        return rest
    if Path(path).suffix in (".pickle", ".pkl"):
        return _images_of_pickle(path, settings, seed)
    rows = _rows(_load_splits(path, own.config), own.split, "split", path)
    if own.min_confidence > 0:
        if CONFIDENCE not in rows.features:
            raise ValueError(
                f"min_confidence: {path} has no column {CONFIDENCE!r}; columns are "
                f"{rows.column_names}"
            )
        confident = np.asarray(rows[CONFIDENCE][:]) >= own.min_confidence
        if not confident.any():
            raise ValueError(f"min_confidence: no image of {path} has {own.min_confidence:g}")
        rows = rows.select(np.flatnonzero(confident))
    column = own.label_column or (PSEUDO_LABEL if PSEUDO_LABEL in rows.features else None)
    labels = torch.full((len(rows),), NO_LABEL)
    if column is not None:
        labels = _labels(rows, _find_label_column(rows, column))
    image_column = _find_image_column(rows, own.image_column)
    return _images(rows, image_column, labels, settings, seed, f"split {own.split} of {path}")


def _images_of_pickle(path: str, settings: DataSettings, seed: int) -> ImageSet:
    """Carmon et al.'s file: ``data`` [N, H, W, C] uint8 and ``extrapolated_targets`` [N]."""
    if not settings.in_memory:
        raise ValueError(f"path: {path} is read with data.in_memory: true only")
    arrays = load_arrays(path)
    pixels = arrays.get("data")
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 4:
        found = {name: f"{a.dtype} {list(a.shape)}" for name, a in arrays.items()}
        raise ValueError(f"path: {path} must hold 'data', uint8 [N, H, W, C], found {found}")
    targets = arrays.get("extrapolated_targets", np.full(len(pixels), NO_LABEL))
    if targets.shape != (len(pixels),) or not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            f"path: 'extrapolated_targets' of {path} must be one integer an image, [{len(pixels)}],"
            f" found {targets.dtype} {list(targets.shape)}"
        )
    labels = torch.from_numpy(targets.astype(np.int64))
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return MemoryImages(images, labels, augment=settings.augment == "crop_flip", seed=seed)


def _check_unlabeled(unlabeled: ImageSet, train: ImageSet, num_classes: int) -> None:
    if unlabeled.shape != train.shape:
        raise ValueError(
            f"unlabeled.path: the unlabelled images are {_by(unlabeled.shape)}, the labelled ones "
            f"{_by(train.shape)}"
        )
    low, high = (int(value) for value in unlabeled.labels.aminmax())
    if low < NO_LABEL or high >= num_classes:
        raise ValueError(
            f"unlabeled.label_column: labels are from {low} to {high}, allowed are 0 to "
            f"{num_classes - 1}, and {NO_LABEL} for none"
        )


def _labels(rows: datasets.Dataset, column: str) -> Tensor:
    labels = rows[column][:]
    if None in labels:
        raise ValueError(f"label_column: {column!r} has no label in row {labels.index(None)}")
    return torch.tensor(labels, dtype=torch.int64)


def _find_image_column(rows: datasets.Dataset, given: str | None) -> str:
    """The column of images: as given, else by its feature type."""
    images = [n for n, f in rows.features.items() if isinstance(f, datasets.Image)]
    return _choose("image_column", given, images, images, rows.features)


def _find_label_column(rows: datasets.Dataset, given: str | None) -> str:
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
    if given is not None and given not in features:
        raise ValueError(f"{key}: there is no column {given!r}; columns are {list(features)}")
    if given is not None and given not in allowed:
        kind = "images" if key == "image_column" else "integers"
        raise ValueError(f"{key}: {given!r} holds no {kind}: {features[given]}")
    if given is None and len(found) != 1:
        raise ValueError(
            f"{key}: name the column; {found or 'none'} would do, columns are {list(features)}"
        )
    return found[0] if given is None else given


def _decode(column: Iterable[Image.Image], where: str) -> Tensor:
    """Decode all images of a column to uint8 [N, C, H, W]; one channel if all are grey."""
    arrays: list[np.ndarray] = []  # [1 or 3, H, W]
    for index, image in enumerate(column):
        if image is None:
            raise ValueError(f"path: image {index} of {where} is missing")
        grey = image.mode == "L"
        array = np.asarray(image if grey else image.convert("RGB"))
        array = array[None] if grey else array.transpose(2, 0, 1)
        if arrays and array.shape[1:] != arrays[0].shape[1:]:
            raise ValueError(
                f"path: image {index} of {where} is {_by(array.shape[1:])}, the first is "
                f"{_by(arrays[0].shape[1:])}; images of several sizes need in_memory: false and "
                "image_size"
            )
        arrays.append(array)
    channels = max(len(array) for array in arrays)
    images = [np.broadcast_to(array, (channels, *array.shape[1:])) for array in arrays]
    return torch.from_numpy(np.stack(images)).contiguous()


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _digits() -> datasets.DatasetDict:
    """scikit-learn's digits as PIL images, every class split alike: 1437 train, 360 test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # 0 to 16 -> 0 to 255
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    parts = train_test_split(
        pixels, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    splits = {}
    for split, images, labels in (("train", parts[0], parts[2]), ("test", parts[1], parts[3])):
        rows = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    return datasets.DatasetDict(splits)
