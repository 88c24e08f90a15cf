"""Encoded images to image sets, in memory or from files, and drawn parts of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robust_accel.data.classes import tell
from robust_accel.data.decoding import SKIP, Pictures, UnusableImage
from robust_accel.data.images import (
    FileImages,
    ImageSet,
    MemoryImages,
    seeded_generator,
    unusable,
)
from robust_accel.data.settings import DataSettings
from robust_accel.data.stored import StoredImages

_NAMED = 3  # of the images that are left out


@dataclass(frozen=True)
class LeftOut:
    """Images that ``data.on_bad: skip`` leaves out: how many of how many, and why the first few."""

    images: int
    of: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class Read:
    """An image set, which of the pictures are in it ([N], int64), and what is left out."""

    images: ImageSet
    kept: Tensor
    left_out: LeftOut | None


def read_images(
    pictures: Pictures,
    labels: Tensor,
    settings: DataSettings,
    seed: int,
    bad_rows: Mapping[int, str] | None = None,
    *,
    whole: bool = False,
) -> Read:
    """An image set as the settings say.

    Args:
        bad_rows: That are left out already, and why.
        whole: Of images from files, see ``FileImages``.

    Raises:
        ValueError: ``path: ...``: in memory an image that cannot be used, or of another size than
            the first; with ``on_bad: skip`` only where no image is left, or no size has most.
    """
    skip = settings.on_bad == "skip"
    if settings.in_memory:
        pixels, bad = _decode(pictures, skip=skip)
    else:
        bad = unusable(pictures, settings.num_workers) if skip else {}
    if len(bad) == len(pictures):
        why = f": {_short(next(iter(bad.values())))}" if bad else ""
        raise ValueError(f"path: none of {len(pictures)} images can be used{why}")
    kept = torch.tensor([i for i in range(len(pictures)) if i not in bad], dtype=torch.int64)
    left_out = left_out_of([*(bad_rows or {}).values(), *bad.values()], len(kept))
    if settings.in_memory:
        memory = MemoryImages.of(pixels, labels[kept], settings, seed)
        return Read(memory, kept, left_out)
    images = FileImages(pictures.select(kept), labels[kept], settings, seed, whole=whole)
    return Read(images, kept, left_out)


def read_drawn(
    pictures: Pictures,
    labels: Tensor,
    settings: DataSettings,
    seed: int,
    bad_rows: Mapping[int, str],
    *,
    size: int | None,
    key: str,
    rest: bool = False,
) -> tuple[ImageSet, ImageSet, LeftOut | None]:
    """So many images, the rest of them where it is wanted, and what is left out of all.

    Only those are decoded; with ``on_bad: skip`` all, since it is drawn from what can be used.

    Raises:
        ValueError: As ``read_images`` and ``drawn``.
    """
    if size is not None and size <= len(pictures) and not rest and settings.on_bad != "skip":
        order, size = drawn_order(len(pictures))[:size], None
        pictures, labels = pictures.select(order), labels[order]
    read = read_images(pictures, labels, settings, seed, bad_rows)
    return *drawn(read.images, size, key), read.left_out


def drawn(images: ImageSet, size: int | None, key: str) -> tuple[ImageSet, ImageSet]:
    """So many images, and the rest."""
    if size is None:
        return images, images.subset(torch.arange(0))
    if size > len(images):
        raise ValueError(f"{key}: {size} exceeds the {len(images)} images there are")
    if isinstance(images, StoredImages):  # their order is in no memory
        return images.drawn(size, 6), images.subset(torch.arange(0))
    order = drawn_order(len(images))
    return images.subset(order[:size]), images.subset(order[size:])


def drawn_order(num_images: int) -> Tensor:
    """Which images ``train_size`` takes first: not to change with the seed of a run."""
    return torch.randperm(num_images, generator=seeded_generator(6))


def held_out(images: ImageSet, size: float) -> tuple[ImageSet, ImageSet]:
    """Images to train on, and held-out ones: a number, or a share below 1."""
    num_held_out = round(size * len(images)) if 0 < size < 1 else int(size)
    if num_held_out >= len(images):
        raise ValueError(f"validation_size: {size} leaves none of {len(images)} images to train")
    if size and not num_held_out:
        raise ValueError(f"validation_size: {size} of {len(images)} images is not one image")
    order = torch.randperm(len(images), generator=seeded_generator(5))
    return images.subset(order[num_held_out:]), images.subset(order[:num_held_out])


def by(shape: Iterable[int]) -> str:
    """A shape in words: 3x32x32."""
    return "x".join(map(str, shape))


def _decode(pictures: Pictures, *, skip: bool) -> tuple[Tensor, dict[int, str]]:
    """All images as uint8 [N, C, H, W], one channel if all are grey; what is skipped, and why."""
    arrays: dict[int, np.ndarray] = {}  # [1 or 3, H, W]
    sizes: dict[str, list[int]] = {}
    bad: dict[int, str] = {}
    for index in range(len(pictures)):
        try:
            array = np.asarray(pictures.decode(index))
        except UnusableImage as error:
            if not skip:
                raise
            bad[index] = str(error)
            continue
        arrays[index] = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        sizes.setdefault(by(array.shape[:2]), []).append(index)
        if len(sizes) > 1 and not skip:
            raise _several_sizes(pictures, sizes)
    if not arrays:
        return torch.empty(0), bad
    usual = max(sizes, key=lambda size: len(sizes.get(size, ())))
    if 2 * len(sizes[usual]) <= len(arrays):
        raise _several_sizes(pictures, sizes)
    for size, indices in sizes.items():
        for index in indices if size != usual else ():
            bad[index] = f"path: {pictures.name(index)} is {size}, most are {usual}"
            del arrays[index]
    channels = max(len(array) for array in arrays.values())
    images = [np.broadcast_to(a, (channels, *a.shape[1:])) for a in arrays.values()]
    return torch.from_numpy(np.stack(images)).contiguous(), dict(sorted(bad.items()))


def _several_sizes(pictures: Pictures, sizes: dict[str, list[int]]) -> ValueError:
    first, other = list(sizes)[:2]
    return ValueError(
        f"path: {pictures.name(sizes[other][0])} is {other}, the first is {first}; images of "
        "several sizes need in_memory: false and image_size, or on_bad: skip if most have one"
    )


def left_out_of(reasons: list[str], kept: int) -> LeftOut | None:
    """What is told, and what reports say."""
    if not reasons:
        return None
    first = tuple(map(_short, reasons[:_NAMED]))
    of = len(reasons) + kept
    more = ["..."] * (len(reasons) > _NAMED)
    text = "; ".join([*first, *more])
    tell(f"{len(reasons)} of {of} images are left out (data.on_bad: skip): {text}")
    return LeftOut(len(reasons), of, first)


def _short(reason: str) -> str:
    return reason.removeprefix("path: ").removesuffix(f"; {SKIP}")
