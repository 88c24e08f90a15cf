"""Images of one shape, in memory or in files, to batches in [0, 1] on the device."""

import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from robust_accel.data.augmentation import image_transform, seeded
from robust_accel.data.batch_augmentation import PAD, PLAIN, BatchAugmentation
from robust_accel.data.decoding import Pictures, UnusableImage
from robust_accel.data.file_pixels import FilePixels
from robust_accel.data.settings import DataSettings

NO_LABEL = -1
HASHED_WHOLE = 2**30  # bytes of encoded images; of larger sets, this many images:
HASHED_IMAGES = 1000
_HASHED_AT_ONCE = 2**10  # images
Batch = tuple[Tensor, Tensor]
"""Images [B, C, H, W] in [0, 1] and labels [B], ``NO_LABEL`` for none, on the device.

Labels that were mixed (``data.mix``) are probabilities, [B, K].
"""


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
    """Images kept as one uint8 tensor; those of a pickle in their file.

    Args:
        images: [N, C, H, W], uint8.
        labels: [N].
        augmentation: Of images that are trained on; nothing unless given.
    """

    def __init__(
        self,
        images: Tensor | FilePixels,
        labels: Tensor,
        augmentation: BatchAugmentation = PLAIN,
    ) -> None:
        self.images = images
        self.labels = labels
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.augmentation = augmentation

    @classmethod
    def of(
        cls, images: Tensor | FilePixels, labels: Tensor, settings: DataSettings, seed: int
    ) -> "MemoryImages":
        """Augmented as the settings say."""
        _, channels, height, width = images.shape
        augmentation = BatchAugmentation.of(settings, (channels, height, width), seed)
        return cls(images, labels, augmentation)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "MemoryImages":
        images = self.images
        some = images[indices] if isinstance(images, Tensor) else images.subset(indices)
        return MemoryImages(some, self.labels[indices], self.augmentation)

    def pooled(self, other: "MemoryImages") -> "MemoryImages":
        own, others = self.images, other.images
        assert isinstance(own, Tensor)  # the labelled ones
        images = torch.cat([own, others]) if isinstance(others, Tensor) else others.after(own)
        return MemoryImages(images, torch.cat([self.labels, other.labels]), self.augmentation)

    def digest(self) -> str:
        """64 hex digits that tell these images, labels and their order from others."""
        found = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for indices in torch.arange(len(self)).split(_HASHED_AT_ONCE):
            found.update(self.images[indices].contiguous().numpy().data)
        found.update(self.labels.contiguous().numpy().data)
        return found.hexdigest()

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device, epoch: int | None = None
    ) -> Iterator[Batch]:
        shifts = None
        if epoch is not None and self.augmentation.shifts:
            shifts = _draw_shifts(len(self), self.augmentation.seed, epoch)
        make = partial(self._made, epoch=epoch, device=device, shifts=shifts)
        workers = 0 if epoch is None else self.augmentation.num_workers
        yield from made(make, index_batches, workers, device)

    def _made(
        self, indices: Tensor, *, epoch: int | None, device: torch.device, shifts: Tensor | None
    ) -> Batch:
        """See ``made``."""
        x = self.images[indices]
        if epoch is not None:
            own = None if shifts is None else shifts[indices]
            x = self.augmentation(x, indices, epoch, device, own)
        return x, self.labels[indices]


class FileImages:
    """Images decoded and transformed by timm's transforms, in worker processes.

    Args:
        whole: Nothing is cut off at the borders: images of ``image_size`` stay as they are.
    """

    def __init__(
        self,
        pictures: Pictures,
        labels: Tensor,
        settings: DataSettings,
        seed: int,
        *,
        whole: bool = False,
    ) -> None:
        assert settings.image_size is not None
        self.pictures, self.labels, self.settings, self.seed = pictures, labels, settings, seed
        self.whole = whole
        self.shape = (3, settings.image_size, settings.image_size)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "FileImages":
        return self._alike(self.pictures.select(indices), self.labels[indices])

    def pooled(self, other: "FileImages") -> "FileImages":
        labels = torch.cat([self.labels, other.labels])
        return self._alike(self.pictures.joined(other.pictures), labels)

    def _alike(self, pictures: Pictures, labels: Tensor) -> "FileImages":
        return FileImages(pictures, labels, self.settings, self.seed, whole=self.whole)

    def digest(self) -> str:
        """As of ``MemoryImages``, of all encoded bytes up to 1 GiB.

        Of larger sets: of every image's number of bytes, and of 1000 images' content. It does not
        depend on where the files lie, nor on when they were written.
        """
        sizes = self.pictures.sizes()
        found = hashlib.sha256(sizes.tobytes() + self.labels.numpy().tobytes())
        number = len(self)
        if sizes.sum() > HASHED_WHOLE:
            number = min(HASHED_IMAGES, number)
        for index in np.linspace(0, len(self) - 1, number).round().astype(int):
            found.update(self.pictures.content(int(index)))
        return found.hexdigest()

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device, epoch: int | None = None
    ) -> Iterator[Batch]:
        """See ``ImageSet``.

        Raises:
            UnusableImage: A ``ValueError`` that names the image and says why.
        """
        decoded = Decoded(self, epoch)
        yield from loaded(decoded, index_batches, self.settings.num_workers, device)


def made(
    make: Callable[[Tensor], Batch],
    index_batches: Iterable[Tensor],
    num_workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches in [0, 1] on the device, by their images' indices.

    Args:
        make: A batch as uint8; with workers, on the CPU.
        num_workers: Processes that make some ahead, where processes are forked: others would each
            have a copy of the images.

    Raises:
        ValueError: What ``make`` raises.
    """
    batches: Iterable[Batch] = map(make, index_batches)
    if num_workers and multiprocessing.get_start_method() == "fork":
        batches = loaded(_Whole(make), index_batches, num_workers, device)
    for x, labels in batches:
        yield x.to(device).contiguous().float() / 255, labels.to(device)


class _Whole(Dataset):
    """Batches for the worker processes, each at once."""

    def __init__(self, make: Callable[[Tensor], Batch]) -> None:
        self.make = make

    def __getitems__(self, indices: list[int]) -> Batch | ValueError:
        try:
            return self.make(torch.tensor(indices))
        except ValueError as error:
            return error  # a worker's exception would become its traceback


def loaded(
    dataset: "Dataset[Any]", index_batches: Iterable[Tensor], num_workers: int, device: torch.device
) -> Iterator[Batch]:
    """Batches of a data set, made by worker processes; each item an image and label, or an error.

    Raises:
        UnusableImage: An item's.
        ValueError: A whole batch's.
    """
    loader: Iterable[Any] = DataLoader(
        dataset,
        batch_sampler=(indices.tolist() for indices in index_batches),  # an epoch's are many
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        collate_fn=_collate,
        generator=torch.Generator(),  # else it would draw from the attacks' stream
    )
    for batch in loader:
        if isinstance(batch, UnusableImage):
            raise UnusableImage(f"data.{batch}")  # nobody else adds the section by then
        if isinstance(batch, ValueError):
            raise batch
        x, labels = batch
        yield x.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def unusable(pictures: Pictures, num_workers: int) -> dict[int, str]:
    """Which images cannot be decoded, by index, and why: each is decoded once."""
    loader: Iterable[list[str]] = DataLoader(
        _Tried(pictures),
        batch_size=64,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),
    )
    reasons = (reason for batch in loader for reason in batch)
    return {index: reason for index, reason in enumerate(reasons) if reason}


class _Tried(Dataset):
    """Why an image cannot be decoded; nothing where it can."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> str:
        try:
            self.pictures.decode(index)
        except UnusableImage as error:
            return str(error)
        return ""


class Decoded(Dataset):
    """One epoch's view of ``FileImages`` for the worker processes."""

    def __init__(self, images: FileImages, epoch: int | None) -> None:
        self.images, self.epoch = images, epoch
        least = images.settings.crop_scale
        self.per_image = None if epoch is None else image_transform(images.settings)
        self.transform = create_transform(
            images.shape,
            is_training=epoch is not None and images.settings.augment == "timm",
            scale=None if least is None else (least, 1.0),
            interpolation="bilinear",
            crop_pct=1.0 if images.whole else None,
            color_jitter=None,  # type: ignore[arg-type]
            mean=(0, 0, 0),  # pixels stay in [0, 1]: normalisation is inside the model
            std=(1, 1, 1),
        )

    def __getitem__(self, index: int) -> tuple[Tensor, int] | UnusableImage:
        try:
            image = self.images.pictures.decode(index).convert("RGB")
        except UnusableImage as error:
            return UnusableImage(str(error))  # a worker's exception would become its traceback
        label = int(self.images.labels[index])
        with seeded(self.images.seed, self.epoch or 0, index):
            x = self.transform(image)
            if self.per_image is not None:
                x = self.per_image((255 * x).round().byte()).float() / 255
            return x, label


def _collate(items: Any) -> Any:
    """A batch, or the error of its first image that has one; what is one batch stays as it is."""
    if not isinstance(items, list):
        return items
    errors = (item for item in items if isinstance(item, UnusableImage))
    return next(errors, None) or default_collate(items)


def derived_seed(*key: int) -> int:
    """A seed that depends on the whole key; zeros at its end say nothing."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on the whole key."""
    return torch.Generator().manual_seed(derived_seed(*key))


def _draw_shifts(num_images: int, seed: int, epoch: int) -> Tensor:
    """Row offset, column offset (0 to 2 * PAD) and mirror flag of every image: [N, 3]."""
    generator = seeded_generator(seed, epoch, 1)
    offsets = torch.randint(0, 2 * PAD + 1, (num_images, 2), generator=generator)
    flips = torch.randint(0, 2, (num_images, 1), generator=generator)
    return torch.cat([offsets, flips], dim=1)
