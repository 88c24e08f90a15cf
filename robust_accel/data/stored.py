"""Images that stay in their file: as many as a disk holds, in the memory of a batch."""

import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust_accel.data.array_files import FileArray
from robust_accel.data.batch_augmentation import PAD, PLAIN, BatchAugmentation
from robust_accel.data.images import HASHED_IMAGES, HASHED_WHOLE, NO_LABEL, Batch, ImageSet, made
from robust_accel.data.orders import Order, draws

_CHUNK = 2**16  # labels at a time
_CHUNK_IMAGES = 2**10


class StoredImages:
    """Images of an array in a file, [N, H, W, C] of uint8; augmented as ``MemoryImages`` are.

    A process keeps nothing of them but the batch at hand; what the kernel has read, all processes
    of a machine share. The file must stay as it is during a run: a new one of that name changes
    nothing, a shorter one is an error.

    Args:
        pixels: The images.
        labels: Theirs, [N] of integers, ``NO_LABEL`` for none; None where none has one.
        augmentation: Of images that are trained on; nothing unless given.
        rows: Which of the array's rows these are; None for all.
        number: How many rows.
    """

    def __init__(
        self,
        pixels: FileArray,
        labels: FileArray | np.ndarray | None,
        augmentation: BatchAugmentation = PLAIN,
        *,
        rows: Order | Tensor | None = None,
        number: int | None = None,
    ) -> None:
        _, height, width, channels = pixels.shape
        self.shape = (channels, height, width)
        self.augmentation = augmentation
        self._pixels, self._labels, self._rows = pixels, labels, rows
        self._number = len(pixels) if number is None else number
        self.present: set[int] | None = None  # see ``labels_among``

    def __len__(self) -> int:
        return self._number

    @property
    def labels(self) -> Tensor:
        """All labels at once, [N] of int64: 8 bytes an image, which training never asks for."""
        return self.labels_at(torch.arange(len(self)))

    @labels.setter
    def labels(self, labels: Tensor) -> None:
        raise AttributeError("labels that stay in their file are not changed")

    def labels_at(self, indices: Tensor) -> Tensor:
        """Of some images, [B] of int64."""
        if self._labels is None:
            return torch.full_like(indices, NO_LABEL)
        labels, rows = self._labels, self._of(indices)
        found = labels.rows(rows) if isinstance(labels, FileArray) else labels[rows]
        return torch.from_numpy(found.astype(np.int64))

    def label_chunks(self) -> Iterator[np.ndarray]:
        """All labels, so many at a time, int64."""
        for indices in _chunks(len(self), _CHUNK):
            yield self.labels_at(indices).numpy()

    def subset(self, indices: Tensor) -> "StoredImages":
        return self._with(torch.from_numpy(self._of(indices)), len(indices))

    def drawn(self, size: int, *key: int) -> "StoredImages":
        """So many images, drawn by a key."""
        assert self._rows is None
        return self._with(Order(len(self), *key), size)

    def pooled(self, other: Any) -> "StoredImages":
        raise ValueError("images that stay in their file are not pooled")

    def digest(self) -> str:
        """As of ``MemoryImages``: of all labels, and of all pixels up to 1 GiB.

        Of larger sets: of 1000 images spread evenly, and of the checksum of all (CRC-32) that a
        ``.npz`` holds. It does not depend on where the file lies, nor on when it was written.
        """
        found = hashlib.sha256(repr((len(self), *self.shape)).encode())
        for labels in self.label_chunks():
            found.update(labels.astype("<i8").data)
        if len(self) * int(np.prod(self.shape)) <= HASHED_WHOLE:
            parts: Iterable[Tensor] = _chunks(len(self), _CHUNK_IMAGES)
        else:
            found.update(repr(self._pixels.crc).encode())
            some = np.linspace(0, len(self) - 1, HASHED_IMAGES).round().astype(np.int64)
            parts = [torch.from_numpy(some)]
            self._pixels.soon(self._of(parts[0]))
        for indices in parts:
            found.update(self._pixels.rows(self._of(indices)).data)
        return found.hexdigest()

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device, epoch: int | None = None
    ) -> Iterator[Batch]:
        """See ``ImageSet``. The kernel reads a batch ahead of the one that is worked on.

        Raises:
            ValueError: ``path: ...``, see ``FileArray.rows``.
        """
        make = partial(self._made, epoch=epoch, device=device)
        workers = 0 if epoch is None else self.augmentation.num_workers
        yield from made(make, self._announced(index_batches), workers, device)

    def _announced(self, index_batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same, each when the kernel has been told of the next one."""
        ahead: list[Tensor] = []  # whose pages are on their way
        for indices in index_batches:
            self._pixels.soon(self._of(indices))
            ahead.append(indices)
            if len(ahead) > 1:
                yield ahead.pop(0)
        yield from ahead

    def _made(self, indices: Tensor, *, epoch: int | None, device: torch.device) -> Batch:
        """See ``made``."""
        x = torch.from_numpy(self._pixels.rows(self._of(indices))).permute(0, 3, 1, 2)
        if epoch is not None:
            shifts = None
            if self.augmentation.shifts:
                drawn = draws(indices, self.augmentation.seed, epoch, 1)
                own = [drawn % (2 * PAD + 1), (drawn >> 20) % (2 * PAD + 1), (drawn >> 40) % 2]
                shifts = torch.stack(own, dim=1)
            x = self.augmentation(x, indices, epoch, device, shifts)
        return x, self.labels_at(indices)

    def _of(self, indices: Tensor) -> np.ndarray:
        """The rows of images."""
        return (indices if self._rows is None else self._rows[indices]).numpy()

    def _with(self, rows: Order | Tensor, number: int) -> "StoredImages":
        parts = self._pixels, self._labels, self.augmentation
        return StoredImages(*parts, rows=rows, number=number)


def labels_among(images: ImageSet) -> set[int]:
    """The labels that images have, ``NO_LABEL`` among them where one has none."""
    if not isinstance(images, StoredImages):
        return set(images.labels.unique().tolist())
    if images.present is None:
        found = [np.bincount(labels - NO_LABEL) for labels in images.label_chunks()]
        images.present = {int(n) + NO_LABEL for counts in found for n in np.flatnonzero(counts)}
    return images.present


def _chunks(number: int, size: int) -> Iterator[Tensor]:
    """0 to number, so many at a time."""
    for start in range(0, number, size):
        yield torch.arange(start, min(start + size, number))
