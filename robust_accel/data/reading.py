"""Encoded images to image sets, in memory or from files, and drawn parts of them."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from robust_accel.data.classes import tell
from robust_accel.data.decoding import Pictures, UnusableImage
from robust_accel.data.images import (
    FileImages,
    ImageSet,
    MemoryImages,
    seeded_generator,
    unusable,
)
from robust_accel.data.settings import DataSettings

_NAMED = 3  # of the images that are left out


def read_images(
    pictures: Pictures, labels: Tensor, settings: DataSettings, seed: int
) -> tuple[ImageSet, Tensor]:
    """An image set as the settings say, and which of the pictures are in it: [N], int64.

    Raises:
        ValueError: ``path: ...``: in memory an image that cannot be used, or of another size than
            the first; with ``damaged: skip`` only where no image is left.
    """
    skip = settings.damaged == "skip"
    if settings.in_memory:
        pixels, bad = _decode(pictures, skip=skip)
    else:
        bad = unusable(pictures, settings.num_workers) if skip else {}
    kept = torch.tensor([i for i in range(len(pictures)) if i not in bad], dtype=torch.int64)
    if bad:
        _say_left_out(list(bad.values()), len(pictures))
    if settings.in_memory:
        augment = settings.augment == "crop_flip"
        return MemoryImages(pixels, labels[kept], augment=augment, seed=seed), kept
    return FileImages(pictures.select(kept), labels[kept], settings, seed), kept


def drawn(images: ImageSet, size: int | None, key: str) -> tuple[ImageSet, ImageSet]:
    """So many images, and the rest."""
    if size is None:
        return images, images.subset(torch.arange(0))
    if size > len(images):
        raise ValueError(f"{key}: {size} exceeds the {len(images)} images there are")
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
    arrays: list[np.ndarray] = []  # [1 or 3, H, W]
    bad: dict[int, str] = {}
    for index in range(len(pictures)):
        try:
            array = np.asarray(pictures.decode(index))
        except UnusableImage as error:
            if not skip:
                raise
            bad[index] = str(error)
            continue
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        if arrays and array.shape[1:] != arrays[0].shape[1:]:
            raise ValueError(
                f"path: {pictures.name(index)} is {by(array.shape[1:])}, the first is "
                f"{by(arrays[0].shape[1:])}; images of several sizes need in_memory: false and "
                "image_size"
            )
        arrays.append(array)
    if not arrays:
        raise ValueError(next(iter(bad.values()), "path: there is no image"))
    channels = max(len(array) for array in arrays)
    images = [np.broadcast_to(array, (channels, *array.shape[1:])) for array in arrays]
    return torch.from_numpy(np.stack(images)).contiguous(), bad


def _say_left_out(reasons: list[str], number: int) -> None:
    if len(reasons) == number:
        raise ValueError(reasons[0])
    first = [r.removeprefix("path: ").partition("; data.damaged")[0] for r in reasons[:_NAMED]]
    text = "; ".join(first + ["..."] * (len(reasons) > _NAMED))
    tell(f"{len(reasons)} of {number} images are left out (data.damaged: skip): {text}")
