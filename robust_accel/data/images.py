"""Images of one shape, in memory or in files, to batches in [0, 1] on the device."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.nn.functional import pad

from robust_accel.data.settings import DataSettings

NO_LABEL = -1
Batch = tuple[Tensor, Tensor]
"""Images [B, C, H, W] in [0, 1] and labels [B], ``NO_LABEL`` for none, on the device."""


class ImageSet(Protocol):
    """Images of one shape."""

    labels: Tensor  # [N], int64, on the CPU; NO_LABEL where there is none
    shape: tuple[int, int, int]  # C, H, W

    def __len__(self) -> int: ...

    def subset(self, indices: Tensor) -> "ImageSet": ...

    def pooled(self, other: Any) -> "ImageSet":
        """One set of both, which are of one kind and shape."""
        ...

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

    def pooled(self, other: "MemoryImages") -> "MemoryImages":
        images = torch.cat([self.images, other.images])
        labels = torch.cat([self.labels, other.labels])
        return MemoryImages(images, labels, augment=self.augment, seed=self.seed)

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
        self, rows: datasets.Dataset, labels: Tensor, settings: DataSettings, seed: int
    ) -> None:
        assert settings.image_size is not None
        self.rows = rows  # one column, of images
        self.labels, self.settings, self.seed = labels, settings, seed
        self.shape = (3, settings.image_size, settings.image_size)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "FileImages":
        rows = self.rows.select(indices.tolist())
        return FileImages(rows, self.labels[indices], self.settings, self.seed)

    def pooled(self, other: "FileImages") -> "FileImages":
        (own,), (name,) = self.rows.column_names, other.rows.column_names
        rows = [self.rows, other.rows.rename_column(name, own) if name != own else other.rows]
        labels = torch.cat([self.labels, other.labels])
        return FileImages(datasets.concatenate_datasets(rows), labels, self.settings, self.seed)

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
        (image,) = self.images.rows[index].values()
        image = image.convert("RGB")
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
