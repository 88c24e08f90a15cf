"""Images of one shape, in memory or in files, to batches in [0, 1] on the device."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import Transform

from robust_accel.data.augmentation import image_transform, seeded
from robust_accel.data.decoding import Pictures, UnusableImage
from robust_accel.data.settings import DataSettings

NO_LABEL = -1
HASHED_WHOLE = 2**30  # bytes of encoded images; of larger sets, this many images:
HASHED_IMAGES = 1000
PAD = 4
Augment = Literal["flip", "crop_flip"]
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
    """Images kept as one uint8 tensor.

    Args:
        images: [N, C, H, W], uint8.
        labels: [N].
        augment: Whole batches on the device, see ``augmented``; None: not at all.
        transform: Of each image after that, on the CPU.
        seed: Of both.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        augment: Augment | None = None,
        transform: Transform | None = None,
        seed: int = 0,
    ) -> None:
        self.images = images
        self.labels = labels
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.augment, self.transform = augment, transform
        self.seed = seed

    @classmethod
    def of(
        cls, images: Tensor, labels: Tensor, settings: DataSettings, seed: int
    ) -> "MemoryImages":
        """Augmented as the settings say."""
        _, channels, height, width = images.shape
        transform = image_transform(settings, (channels, height, width))
        augment = batch_augment(settings)
        return cls(images, labels, augment=augment, transform=transform, seed=seed)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "MemoryImages":
        return self._alike(self.images[indices], self.labels[indices])

    def pooled(self, other: "MemoryImages") -> "MemoryImages":
        images = torch.cat([self.images, other.images])
        return self._alike(images, torch.cat([self.labels, other.labels]))

    def _alike(self, images: Tensor, labels: Tensor) -> "MemoryImages":
        about: Any = {"augment": self.augment, "transform": self.transform, "seed": self.seed}
        return MemoryImages(images, labels, **about)

    def digest(self) -> str:
        """64 hex digits that tell these images, labels and their order from others."""
        found = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            found.update(tensor.contiguous().numpy().data)
        return found.hexdigest()

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device, epoch: int | None = None
    ) -> Iterator[Batch]:
        augment = None if epoch is None else self.augment
        draws = _draw_crops(len(self), self.seed, epoch or 0) if augment else None
        transform = None if epoch is None else self.transform
        where = device if transform is None else torch.device("cpu")
        for indices in index_batches:
            x = self.images[indices].to(where)
            if augment and draws is not None:
                x = augmented(x, draws[indices].to(where), augment)
            if transform is not None:
                x = transformed(x, transform, indices, self.seed, epoch or 0).to(device)
            yield x.float() / 255, self.labels[indices].to(device)


def transformed(x: Tensor, transform: Transform, indices: Tensor, seed: int, epoch: int) -> Tensor:
    """Each image by its own draw: x [B, C, H, W], uint8, on the CPU."""
    found = []
    for image, index in zip(x, indices.tolist(), strict=True):
        with seeded(seed, epoch, index):
            found.append(transform(image))
    return torch.stack(found)


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


def loaded(
    dataset: "Dataset[Any]", index_batches: Iterable[Tensor], num_workers: int, device: torch.device
) -> Iterator[Batch]:
    """Batches of a data set, made by worker processes; each item an image and label, or an error.

    Raises:
        UnusableImage: An item's.
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
        self.per_image = None if epoch is None else image_transform(images.settings, images.shape)
        self.transform = create_transform(
            images.shape,
            is_training=epoch is not None and images.settings.augment == "timm",
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


def _collate(items: list[Any]) -> Any:
    """A batch, or the error of its first image that has one."""
    errors = (item for item in items if isinstance(item, UnusableImage))
    return next(errors, None) or default_collate(items)


def derived_seed(*key: int) -> int:
    """A seed that depends on the whole key; zeros at its end say nothing."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


def seeded_generator(*key: int) -> torch.Generator:
    """A CPU generator whose stream depends on the whole key."""
    return torch.Generator().manual_seed(derived_seed(*key))


def batch_augment(settings: DataSettings) -> Augment | None:
    """What ``data.augment`` says of images in memory."""
    augment = settings.augment
    return None if augment == "none" or augment == "timm" else augment


def _draw_crops(num_images: int, seed: int, epoch: int) -> Tensor:
    """Row offset, column offset (0 to 2 * PAD) and mirror flag of every image: [N, 3]."""
    generator = seeded_generator(seed, epoch, 1)
    offsets = torch.randint(0, 2 * PAD + 1, (num_images, 2), generator=generator)
    flips = torch.randint(0, 2, (num_images, 1), generator=generator)
    return torch.cat([offsets, flips], dim=1)


def augmented(x: Tensor, draws: Tensor, augment: Augment) -> Tensor:
    """Mirrored where that is drawn, and cropped to the old size after padding by 4 zeros.

    Args:
        x: [B, C, H, W].
        draws: Row, column and whether to mirror: [B, 3] of integers.
        augment: ``flip`` mirrors alone.
    """
    batch, channels, height, width = x.shape
    row, column, flip = draws[:, 0:1], draws[:, 1:2], draws[:, 2:3].bool()  # [B, 1]
    if augment == "flip":
        return torch.where(flip[:, :, None, None], x.flip(3), x)
    rows = row + torch.arange(height, device=x.device)  # [B, H]
    steps = torch.arange(width, device=x.device)
    columns = column + torch.where(flip, steps.flip(0), steps)  # [B, W]
    padded = pad(x, (PAD,) * 4)
    return padded[
        torch.arange(batch, device=x.device)[:, None, None, None],
        torch.arange(channels, device=x.device)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
