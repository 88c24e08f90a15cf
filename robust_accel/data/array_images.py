"""Images that others have published as arrays: in pickles, ``.npz`` files and folders of arrays."""

import json
import math
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from robust_accel.data.array_files import FileArray, array_names, stored_array
from robust_accel.data.array_pickle import HELD, load_arrays
from robust_accel.data.batch_augmentation import BatchAugmentation
from robust_accel.data.classes import Classes, shown, tell
from robust_accel.data.file_pixels import FilePixels
from robust_accel.data.images import NO_LABEL, ImageSet, MemoryImages
from robust_accel.data.labels import checked_labels
from robust_accel.data.reading import LeftOut, left_out_of
from robust_accel.data.settings import DataSettings, UnlabeledSettings
from robust_accel.data.stored import StoredImages

_CHUNK = 2**16  # labels at a time
_MOST_NAMES = 2**24  # bytes
# Names of the images and of their labels: EDM's files and Carmon et al.'s, and of a folder.
CLASS_NAMES = "class_names"  # of what `pseudo-label` writes: a list in JSON, as bytes
NAMES = {"image": "label", "images": "labels", "data": "extrapolated_targets"}


def images_of_arrays(
    path: str, own: UnlabeledSettings, settings: DataSettings, seed: int, classes: Classes
) -> StoredImages:
    """The images of a ``.npz`` or of a folder of arrays, which stay there.

    Args:
        classes: Those of the training data, whose numbers the labels must be.

    Raises:
        ValueError: ``key: ...``: an array is missing, or not as it must be; a label is of no class;
            a setting does not go with such files.
    """
    _check_in_memory(path, settings)
    _check_settings(path, own)
    image, label = _names(path, own)
    found = stored_array(path, image)
    what = f"path: {image!r} of {path}"
    if found.dtype != np.uint8 or len(found.shape) != 4:
        raise ValueError(f"{what} must be uint8 [N, H, W, C], found {found}")
    rows, height, _, channels = found.shape
    if channels not in (1, 3):
        order = " (channels first? transpose(0, 2, 3, 1))" if height in (1, 3) else ""
        raise ValueError(
            f"{what} must have 1 or 3 channels, last: uint8 [N, H, W, C], found {found}{order}"
        )
    if 0 in found.shape:
        raise ValueError(f"{what} holds no image: {found}")
    labels = None
    if label is not None:
        _check_classes(path, label, settings, classes)
        targets = stored_array(path, label)
        if targets.shape != (rows,) or targets.dtype.kind not in "iu":
            raise ValueError(
                f"path: {label!r} of {path} must be one integer an image, [{rows}], found {targets}"
            )
        labels = targets.open()
        _check_labels(labels, classes.number, f"path: {label!r}", path)
    shape = channels, height, found.shape[2]
    return StoredImages(found.open(), labels, BatchAugmentation.of(settings, shape, seed))


def _check_settings(path: str, own: UnlabeledSettings) -> None:
    if own.fraction is None:
        raise ValueError(
            f"fraction: null pools images in memory, and those of {path} stay in their file: give "
            "their share of each batch"
        )
    own.refuse(("config", "split", "min_confidence"), f"arrays as in {path}")


def _names(path: str, own: UnlabeledSettings) -> tuple[str, str | None]:
    """Of the images and of the labels; None where the file holds nothing but images."""
    there = array_names(path)
    pairs = " or ".join(f"{image!r} and {label!r}" for image, label in NAMES.items())
    for key in ("image_column", "label_column"):
        name = getattr(own, key)
        if name is not None and name not in there:
            raise ValueError(f"{key}: {path} has no array {name!r}; arrays are {shown(there)}")
    image = own.image_column or next((name for name in NAMES if name in there), None)
    if image is None:
        raise ValueError(
            f"path: {path} must hold {pairs} (or unlabeled.image_column names the images), found "
            f"{shown(there)}"
        )
    label = own.label_column or NAMES.get(image)
    if there == [image]:
        return image, None
    if label not in there:
        raise ValueError(
            f"label_column: {path} has the images {image!r} and no labels {label or ''!r}; found "
            f"{shown(there)}: name the labels, or keep nothing but images in it"
        )
    return image, label


def _check_labels(labels: FileArray, number: int, key: str, path: str) -> None:
    """As ``checked_labels``, some at a time; nothing is left out."""
    for start in range(0, len(labels), _CHUNK):
        part = labels.rows(np.arange(start, min(start + _CHUNK, len(labels))))
        wrong = np.flatnonzero((part < NO_LABEL) | (part >= number))
        if len(wrong):
            raise ValueError(
                f"{key}: row {start + int(wrong[0])} of {path} has the label {part[wrong[0]]}, "
                f"allowed are 0 to {number - 1}, and {NO_LABEL} for none; no row of a file that "
                "is not read into memory is left out, by data.on_bad: skip neither"
            )


def _check_in_memory(path: str, settings: DataSettings) -> None:
    if not settings.in_memory:
        raise ValueError(f"path: {path} is read with data.in_memory: true only")


def _check_classes(path: str, label: str, settings: DataSettings, train: Classes) -> None:
    """Refuse labels, which stay in the file as they are, that are numbers of other classes."""
    names = _class_names(path)
    if names is None:
        _check_numbers(path, label, settings)
        return
    own = Classes(len(names), names, path)
    try:
        positions, doubt = own.positions_in(train)
    except ValueError as error:
        raise ValueError(f"path: {error}") from None
    if positions is not None:
        raise ValueError(
            f"path: {label!r} of {path} numbers the classes {shown(names)}, the training data "
            f"{shown(train.names or ())}: let pseudo-label write a .parquet, whose labels are "
            "found by name"
        )
    if doubt and (own.named or train.named):
        tell(doubt)


def _class_names(path: str) -> tuple[str, ...] | None:
    """Names that stand beside labels, as ``pseudo-label`` writes them; None without such."""
    names: Any = None
    with suppress(ValueError, KeyError):
        array = stored_array(path, CLASS_NAMES)
        if array.dtype == np.uint8 and math.prod(array.shape) < _MOST_NAMES:
            names = json.loads(array.open().whole().tobytes())
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _check_numbers(path: str, name: str, settings: DataSettings) -> None:
    if settings.classes is not None:
        raise ValueError(
            f"path: {name!r} of {path} are numbers, but data.classes numbers classes anew: it "
            "cannot be told which class is meant"
        )


def images_of_pickle(
    path: str, settings: DataSettings, seed: int, number: int
) -> tuple[ImageSet, LeftOut | None]:
    """Carmon et al.'s file: ``data`` [N, H, W, C] uint8 and ``extrapolated_targets`` [N].

    The images stay in it, where it holds their bytes as they are.
    """
    _check_in_memory(path, settings)
    arrays = load_arrays(path)
    pixels = arrays.get("data")
    if pixels is None or pixels.dtype != np.uint8 or len(pixels.shape) != 4:
        found = {name: f"{a.dtype} {list(a.shape)}" for name, a in arrays.items()}
        raise ValueError(f"path: {path} must hold 'data', uint8 [N, H, W, C], found {found}")
    targets = arrays.get("extrapolated_targets", np.full(len(pixels), NO_LABEL))
    if targets.shape != (len(pixels),) or not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            f"path: 'extrapolated_targets' of {path} must be one integer an image, [{len(pixels)}],"
            f" found {targets.dtype} {list(targets.shape)}"
        )
    if isinstance(targets, FileArray):
        targets = targets.whole()
    if bool((targets != NO_LABEL).any()):
        _check_numbers(path, "extrapolated_targets", settings)
    column = pa.chunked_array([targets.astype(targets.dtype.newbyteorder("="))])
    about: Any = {"lowest": NO_LABEL, "skip": settings.on_bad == "skip"}
    labels, bad = checked_labels(column, number, "path: 'extrapolated_targets'", path, **about)
    images = FilePixels(pixels) if isinstance(pixels, FileArray) else _in_memory(path, pixels)
    every = MemoryImages.of(images, labels, settings, seed)
    if bad:
        every = every.subset(torch.tensor([row for row in range(len(labels)) if row not in bad]))
    return every, left_out_of([*bad.values()], len(every))


def _in_memory(path: str, pixels: np.ndarray) -> torch.Tensor:
    """The images [N, H, W, C] of a pickle as [N, C, H, W]."""
    if pixels.nbytes > HELD:
        tell(
            f"the images of {path} do not lie there as they are (pickle's protocols 0 to 2 write "
            f"them as text): each process keeps {pixels.nbytes:,} bytes of them in memory; pickled "
            "anew by protocol 3 or later, in C's order, they stay in the file"
        )
    return torch.from_numpy(np.array(pixels.transpose(0, 3, 1, 2), order="C"))
