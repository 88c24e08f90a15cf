"""Images: from a hub, a folder or parquet to batches in [0, 1] on the device."""

import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import datasets
import numpy as np
import torch
from annotated_types import Ge
from PIL import Image
from pydantic import model_validator
from timm.data import create_transform
from torch import Tensor
from torch.nn.functional import pad

from robust_accel.settings import Settings

DIGITS = "sklearn:digits"
Batch = tuple[Tensor, Tensor]
"""Images [B, C, H, W] in [0, 1] and labels [B], on the device."""


class DataSettings(Settings):
    """The recipe's ``data`` section.

    Args:
        path: A data set on the hub, a local folder or parquet file that ``load_dataset`` reads,
            or ``sklearn:digits`` (scikit-learn's 8x8 digits, one fifth of them as test split).
        config: Name of the data set's configuration, where it has several.
        train_split, test_split: Names of the splits.
        image_column, label_column: Found by their feature types when not given.
        validation_size: Training images held out to choose checkpoints: a number, or a share < 1.
        train_size, test_size: Use only so many images of a split, drawn once by a fixed seed.
        in_memory: Decode all images once and keep them as uint8 (for small images of one size).
        augment: ``crop_flip`` (in memory: pad by 4, crop, mirror, in batches on the device),
            ``timm`` (from files: random resized crop and mirror), or ``none``.
        image_size: Height and width that images from files are cropped and resized to.
        num_workers: Processes that decode images from files.
        sharding: ``global``: each epoch deals all images anew. ``fixed``: each worker keeps its
            own part, the paper's D(i), and reshuffles that.
    """

    path: str
    config: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    image_column: str | None = None
    label_column: str | None = None
    validation_size: Annotated[int, Ge(0)] | Annotated[float, Ge(0)] = 0
    train_size: Annotated[int, Ge(1)] | None = None
    test_size: Annotated[int, Ge(1)] | None = None
    in_memory: bool = True
    augment: Literal["none", "crop_flip", "timm"] = "none"
    image_size: Annotated[int, Ge(1)] | None = None
    num_workers: Annotated[int, Ge(0)] = 4
    sharding: Literal["global", "fixed"] = "global"

    @model_validator(mode="after")
    def _fits_together(self) -> "DataSettings":
        if self.augment == ("timm" if self.in_memory else "crop_flip"):
            raise ValueError(
                f"augment: {self.augment} does not go with in_memory: {str(self.in_memory).lower()}"
                " (crop_flip: in memory; timm: from files; none: both)"
            )
        if self.in_memory == (self.image_size is not None):
            raise ValueError(
                "image_size is for images from files (in_memory: false), which need it; got "
                f"{self.image_size}"
            )
        if self.validation_size > 1 and self.validation_size % 1:
            raise ValueError(
                f"validation_size: {self.validation_size} is neither a number of images nor a "
                "share < 1"
            )
        return self


class ImageSet(Protocol):
    """Labelled images of one shape."""

    labels: Tensor  # [N], int64, on the CPU
    shape: tuple[int, int, int]  # C, H, W

    def __len__(self) -> int: ...

    def subset(self, indices: Tensor) -> "ImageSet": ...

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device, epoch: int | None = None
    ) -> Iterator[Batch]:
        """Batches by their images' indices; augmented by (seed, epoch, index) if epoch is given.

        An image's augmentation depends on nothing else: not on the order, nor on the number of
        processes, nor on where a run was interrupted.
        """
        ...


class MemoryImages:
    """Images kept as one uint8 tensor; augmentation works on whole batches, on the device."""

    def __init__(
        self, images: Tensor, labels: Tensor, *, augment: bool = False, seed: int = 0
    ) -> None:
        self.images = images  # [N, C, H, W], uint8
        self.labels = labels
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "MemoryImages":
        return MemoryImages(
            self.images[indices], self.labels[indices], augment=self.augment, seed=self.seed
        )

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device, epoch: int | None = None
    ) -> Iterator[Batch]:
        augment = self.augment and epoch is not None
        draws = _draw_crops(len(self), self.seed, epoch or 0) if augment else None
        for indices in index_batches:
            x = self.images[indices].to(device)
            if draws is not None:
                x = crop_flip(x, draws[indices].to(device))
            yield x.float() / 255, self.labels[indices].to(device)


class FileImages:
    """Images decoded and transformed by timm's transforms, in worker processes."""

    def __init__(
        self, rows: datasets.Dataset, columns: tuple[str, str], settings: DataSettings, seed: int
    ) -> None:
        assert settings.image_size is not None
        self.rows, self.columns, self.settings, self.seed = rows, columns, settings, seed
        self.labels = _labels(rows, columns[1])
        self.shape = (3, settings.image_size, settings.image_size)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "FileImages":
        rows = self.rows.select(indices.tolist())
        return FileImages(rows, self.columns, self.settings, self.seed)

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device, epoch: int | None = None
    ) -> Iterator[Batch]:
        loader = torch.utils.data.DataLoader(
            _Decoded(self, epoch if self.settings.augment == "timm" else None),
            batch_sampler=[indices.tolist() for indices in index_batches],
            num_workers=self.settings.num_workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the attacks' stream
        )
        for x, labels in loader:
            yield x.to(device, non_blocking=True), labels.to(device, non_blocking=True)


class _Decoded(torch.utils.data.Dataset):
    """One epoch's view of ``FileImages`` for the worker processes."""

    def __init__(self, images: FileImages, epoch: int | None) -> None:
        self.images, self.epoch = images, epoch
        self.transform = create_transform(
            images.shape,
            is_training=epoch is not None,
            interpolation="bilinear",
            color_jitter=None,  # type: ignore[arg-type]
            mean=(0, 0, 0),  # pixels stay in [0, 1]: normalisation is inside the model
            std=(1, 1, 1),
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image_column, _ = self.images.columns
        image = self.images.rows[index][image_column].convert("RGB")
        with _seeded(self.images.seed, self.epoch or 0, index):
            return self.transform(image), int(self.images.labels[index])


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Seed Python's and torch's generators by the key, and put their states back."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on the whole key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


_PAD = 4


def _draw_crops(num_images: int, seed: int, epoch: int) -> Tensor:
    """Row offset, column offset (0 to 2 * _PAD) and mirror flag of every image: [N, 3]."""
    generator = seeded_generator(seed, epoch, 1)
    offsets = torch.randint(0, 2 * _PAD + 1, (num_images, 2), generator=generator)
    flips = torch.randint(0, 2, (num_images, 1), generator=generator)
    return torch.cat([offsets, flips], dim=1)


def crop_flip(x: Tensor, draws: Tensor) -> Tensor:
    """Pad by 4 zeros, crop to the old size and mirror: x [B, C, H, W], draws [B, 3] of ints."""
    batch, channels, height, width = x.shape
    row, column, flip = draws[:, 0:1], draws[:, 1:2], draws[:, 2:3].bool()  # [B, 1]
    rows = row + torch.arange(height, device=x.device)  # [B, H]
    steps = torch.arange(width, device=x.device)
    columns = column + torch.where(flip, steps.flip(0), steps)  # [B, W]
    padded = pad(x, (_PAD,) * 4)
    return padded[
        torch.arange(batch, device=x.device)[:, None, None, None],
        torch.arange(channels, device=x.device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


class Sampler:
    """Deals the training images to processes: the same deal, whoever computes it.

    Each epoch is cut into steps of ``batch_size`` images, each step into a part a process and
    micro-batch. Images that do not fill the last step wait for another epoch's order, so no image
    is weighted twice.

    Args:
        num_images: N.
        batch_size: Images a step over all processes.
        num_micro: Micro-batches a step and process.
        rank, world_size: Of this process.
        seed: Of the order.
        sharding: See ``DataSettings``.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        num_micro: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        sharding: Literal["global", "fixed"] = "global",
    ) -> None:
        if batch_size % (num_micro * world_size):
            raise ValueError(
                f"batch_size: {batch_size} is not divisible by {world_size} processes x "
                f"{num_micro} micro-batches"
            )
        if batch_size > num_images:
            raise ValueError(f"batch_size: {batch_size} exceeds the {num_images} training images")
        self.steps_per_epoch = num_images // batch_size
        self._micro_size = batch_size // (num_micro * world_size)
        self._num_images, self._num_micro = num_images, num_micro
        self._rank, self._world_size = rank, world_size
        self._seed, self._sharding = seed, sharding

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Tensor]:
        """This process's micro-batches of indices, from a step on."""
        order = self._own(epoch)[: self.steps_per_epoch * self._num_micro * self._micro_size]
        micro_batches = order.split(self._micro_size)
        return itertools.islice(iter(micro_batches), first_step * self._num_micro, None)

    def _own(self, epoch: int) -> Tensor:
        """This process's images in the epoch's order."""
        if self._sharding == "fixed":
            dealt = torch.randperm(self._num_images, generator=seeded_generator(self._seed, 2))
            own = dealt[self._rank :: self._world_size]
            generator = seeded_generator(self._seed, 3, epoch, self._rank)
            return own[torch.randperm(len(own), generator=generator)]
        order = torch.randperm(self._num_images, generator=seeded_generator(self._seed, 4, epoch))
        used = order[: self.steps_per_epoch * self._micro_size * self._num_micro * self._world_size]
        # [steps, processes, images of a process]: a step's images do not depend on their number
        by_step = used.view(self.steps_per_epoch, self._world_size, -1)
        return by_step[:, self._rank].flatten()


@dataclass(frozen=True)
class Data:
    """The splits of a data set; ``validation`` is held out of train, ``test`` only measured."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    num_classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.train.shape


def load_data(settings: DataSettings, *, seed: int = 0) -> Data:
    """Load and check both splits.

    Raises:
        ValueError: ``key: what was found, what is allowed`` for a path, split, column or image
            that is not as declared.
    """
    splits = _load_splits(settings)
    train, num_classes = _load_images(splits, settings, settings.train_split, seed)
    test, test_classes = _load_images(splits, settings, settings.test_split, seed)
    if train.shape != test.shape:
        raise ValueError(
            f"path: images of split {settings.train_split} are {_by(train.shape)}, of split "
            f"{settings.test_split} {_by(test.shape)}"
        )
    # fixed seeds: which images are held out must not change with the seed of a run
    train = _first(train, settings.train_size, "train_size")
    test = _first(test, settings.test_size, "test_size")
    held_out = settings.validation_size
    num_held_out = round(held_out * len(train)) if 0 < held_out < 1 else int(held_out)
    if num_held_out >= len(train):
        raise ValueError(f"validation_size: {held_out} leaves none of {len(train)} images to train")
    if held_out and not num_held_out:
        raise ValueError(f"validation_size: {held_out} of {len(train)} images is not one image")
    order = torch.randperm(len(train), generator=seeded_generator(5))
    return Data(
        train=train.subset(order[num_held_out:]),
        validation=train.subset(order[:num_held_out]),
        test=test,
        num_classes=max(num_classes, test_classes),
    )


def load_test(settings: DataSettings) -> tuple[ImageSet, int]:
    """The test split alone and its number of classes, for evaluation."""
    images, num_classes = _load_images(_load_splits(settings), settings, settings.test_split, 0)
    return _first(images, settings.test_size, "test_size"), num_classes


def _first(images: ImageSet, size: int | None, key: str) -> ImageSet:
    if size is None:
        return images
    if size > len(images):
        raise ValueError(f"{key}: {size} exceeds the {len(images)} images there are")
    return images.subset(torch.randperm(len(images), generator=seeded_generator(6))[:size])


def _load_splits(settings: DataSettings) -> datasets.DatasetDict:
    path = settings.path
    try:
        if path == DIGITS:
            return _digits()
        if Path(path).suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=path)
        return datasets.load_dataset(path, settings.config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        local = "" if Path(path).exists() else " (no such local path, so the hub was asked)"
        raise ValueError(f"path: {path!r} cannot be loaded{local}: {error}") from error


def _load_images(
    splits: datasets.DatasetDict, settings: DataSettings, split: str, seed: int
) -> tuple[ImageSet, int]:
    """One split, and its number of classes."""
    if split not in splits:
        key = "train_split" if split == settings.train_split else "test_split"
        raise ValueError(f"{key}: {settings.path} has no split {split!r}; it has {list(splits)}")
    rows = splits[split]
    columns = _find_columns(rows, settings)
    if len(rows) == 0:
        raise ValueError(f"path: split {split} of {settings.path} holds no image")
    images: ImageSet
    if settings.in_memory:
        pixels = _decode(rows[columns[0]], f"split {split} of {settings.path}")
        labels = _labels(rows, columns[1])
        images = MemoryImages(pixels, labels, augment=settings.augment == "crop_flip", seed=seed)
    else:
        images = FileImages(rows, columns, settings, seed)
    low, high = (int(value) for value in images.labels.aminmax())
    feature = rows.features[columns[1]]
    num_classes = getattr(feature, "num_classes", None) or high + 1
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"label_column: {columns[1]!r} of split {split} holds labels from {low} to {high}, "
            f"allowed are 0 to {num_classes - 1}"
        )
    return images, num_classes


def _labels(rows: datasets.Dataset, column: str) -> Tensor:
    labels = rows[column][:]
    if None in labels:
        raise ValueError(f"label_column: {column!r} has no label in row {labels.index(None)}")
    return torch.tensor(labels, dtype=torch.int64)


def _find_columns(rows: datasets.Dataset, settings: DataSettings) -> tuple[str, str]:
    """Names of the image and the label column: as given, else by feature type."""
    features: dict[str, Any] = rows.features
    images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
    scalars = {n: f for n, f in features.items() if isinstance(f, datasets.Value)}
    classes = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
    integers = [n for n, f in scalars.items() if "int" in f.dtype]
    labels = classes or [n for n in integers if "label" in n] or integers
    return (
        _choose("image_column", settings.image_column, images, images, features),
        _choose("label_column", settings.label_column, labels, classes + integers, features),
    )


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
