"""Images that noise, blur, weather or compression have corrupted: published, or made here."""

import importlib.metadata
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from torch import Tensor
from torch.utils.data import Dataset

from robust_accel.data.array_files import StoredArray, stored_array
from robust_accel.data.classes import renumbered_labels, shown
from robust_accel.data.decoding import Pictures, Source, UnusableImage
from robust_accel.data.images import Batch, Decoded, FileImages, ImageSet, loaded
from robust_accel.data.reading import by, read_images
from robust_accel.data.settings import DataSettings
from robust_accel.data.stored import StoredImages

SEVERITIES = 5  # that a published file holds, one after another
GENERATOR = "imagecorruptions-imaug"
_SMALLEST = 32  # pixels a side, of the generator's images
_KEPT = 2**30  # bytes of generated images that a process keeps
_WNID = re.compile(r"n\d{8}")  # ImageNet's folders, in whose order its classes are numbered

Labels = Callable[[Sequence[str]], Tensor]
"""Labels by the names of class folders: one each."""


@dataclass(frozen=True)
class Corrupted:
    """Images of one corruption, and the severity of each: [N]."""

    images: ImageSet
    severity: Tensor


# ---- published ---------------------------------------------------------------------------------


def check_published(
    path: str,
    names: Sequence[str],
    severities: Sequence[int],
    *,
    like: ImageSet,
    num_classes: int,
    labels_of: Labels,
) -> None:
    """Look for all that is to be measured, without reading images.

    Args:
        like: Images of the shape that is wanted.
        num_classes: Of the data.

    Raises:
        ValueError: ``path: ...``: a corruption or severity is not there, not as it must be, of
            classes that the model has not, or without images.
    """
    if not os.path.isdir(path):
        raise ValueError(f"path: {path!r} is no folder: CIFAR-10-C's or ImageNet-C's is wanted")
    for name in names:
        if _is_array(path, name):
            _numbers(path, _pixels(path, name, like).shape[0], num_classes)
        else:
            for severity in severities:
                next(_listed(_folder(path, name, severity), labels_of))


def published(
    path: str,
    name: str,
    severities: Sequence[int],
    number: int | None,
    *,
    like: ImageSet,
    num_classes: int,
    positions: Sequence[int] | None,
    labels_of: Labels,
) -> Corrupted:
    """The published images of a corruption; arrays stay in their file.

    Args:
        number: The first so many of each severity; folders are read in the order of file names.
        like: The images that they are to be read as.
        positions: The model's number of each class of the data, see ``match_classes``.

    Raises:
        ValueError: ``path: ...``.
    """
    if not _is_array(path, name):
        return _of_folders(path, name, severities, number, like, labels_of)
    pixels = _pixels(path, name, like)
    each = pixels.shape[0] // SEVERITIES
    labels = _numbers(path, pixels.shape[0], num_classes)
    own = renumbered_labels(torch.from_numpy(labels.astype(np.int64)), positions).numpy()
    first = torch.arange(min(number or each, each))
    rows = torch.cat([(severity - 1) * each + first for severity in severities])
    images = StoredImages(pixels.open(), own, rows=rows, number=len(rows))
    return Corrupted(images, torch.tensor(severities).repeat_interleave(len(first)))


def labels_by_folder(
    class_names: Sequence[str] | None,
    num_classes: int,
    positions: Sequence[int] | None,
    path: str,
) -> Labels:
    """Labels of folders by the model's class names; ImageNet's folders also by their order, where
    the model does not call its classes like these.

    Args:
        class_names: Of the model.
        num_classes: Of the data.
        positions: As of ``published``.

    Raises (when called):
        ValueError: ``path: ...``: the model has no such class.
    """

    def labels(names: Sequence[str]) -> Tensor:
        known = list(class_names or map(str, range(num_classes)))
        other = [name for name in names if name not in known]
        if not other:
            return torch.tensor([known.index(name) for name in names])
        by_order = not any(map(_WNID.fullmatch, known))
        if by_order and len(names) == num_classes and all(map(_WNID.fullmatch, names)):
            return renumbered_labels(torch.arange(num_classes), positions)
        raise ValueError(
            f"path: {path} has the classes {shown(other)}, which the model has not: allowed are "
            f"{shown(known)}"
            + ", and all of ImageNet's folders (n01440764, ...) for its classes"
            * by_order
        )

    return labels


def _is_array(path: str, name: str) -> bool:
    return Path(path, f"{name}.npy").is_file()


def _pixels(path: str, name: str, like: ImageSet) -> StoredArray:
    """A corruption's file: [5 x N, H, W, C] of uint8."""
    found = stored_array(path, name)
    channels, height, width = like.shape
    wanted = (height, width, channels)
    if found.dtype != np.uint8 or found.shape[1:] != wanted or found.shape[0] % SEVERITIES:
        raise ValueError(
            f"path: {name}.npy of {path} must be uint8 [{SEVERITIES} x N, {by(wanted)}], channels "
            f"last, {SEVERITIES} severities one after another, found {found}"
        )
    return found


def _numbers(path: str, wanted: int, num_classes: int) -> np.ndarray:
    """The labels of every file: [5 x N] of integers."""
    found = stored_array(path, "labels")
    if found.shape != (wanted,) or found.dtype.kind not in "iu":
        raise ValueError(
            f"path: labels.npy of {path} must be one integer an image, [{wanted}], found {found}"
        )
    labels = found.open().whole()
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(
            f"path: row {wrong[0]} of labels.npy of {path} is {labels[wrong[0]]}, allowed are 0 to "
            f"{num_classes - 1}"
        )
    return labels


def _folder(path: str, name: str, severity: int) -> Path:
    """Where a severity's classes are: its corruption's folder may lie in one of its kind's."""
    kinds = sorted(place for place in Path(path).glob(f"*/{name}") if place.is_dir())
    found = [place for place in (Path(path, name), *kinds) if place.is_dir()]
    if not found:
        raise ValueError(
            f"path: {path} has no corruption {name!r}: {name}.npy or the folder {name} is wanted"
        )
    folder = found[0] / str(severity)
    if not folder.is_dir():
        raise ValueError(f"path: {found[0]} has no folder of severity {severity}")
    return folder


def _listed(folder: Path, labels_of: Labels) -> Iterator[tuple[str, str, int]]:
    """The images of a severity: file, class folder and label of each."""
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    is_empty = True
    for place, label in zip(classes, labels_of(classes).tolist(), strict=True):
        for file in os.listdir(folder / place):
            if Path(file).suffix.lower() in ImageFolder.EXTENSIONS:
                is_empty = False
                yield file, place, label
    if is_empty:
        raise ValueError(f"path: {folder} holds no image: CLASS/IMAGE is wanted")


def _of_folders(
    path: str,
    name: str,
    severities: Sequence[int],
    number: int | None,
    like: ImageSet,
    labels_of: Labels,
) -> Corrupted:
    settings = DataSettings(path=path)
    if isinstance(like, FileImages):
        settings = like.settings
    parts, severity = [], []
    for each in severities:
        folder = _folder(path, name, each)
        # by their names: those of ImageNet are in its own order
        files = sorted(_listed(folder, labels_of))[:number]
        names = [str(folder / place / file) for file, place, _ in files]
        rows = datasets.Dataset.from_dict(
            {"image": names}, features=datasets.Features({"image": datasets.Image()})
        )
        pictures = Pictures.of(Source(rows, "image", str(folder)), torch.arange(len(rows)))
        labels = torch.tensor([label for _, _, label in files])
        images = read_images(pictures, labels, settings, 0, whole=True).images
        if images.shape != like.shape:
            raise ValueError(
                f"path: images of {folder} are {by(images.shape)}, the test images {by(like.shape)}"
            )
        parts.append(images)
        severity.append(torch.full((len(images),), each))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.pooled(part)
    return Corrupted(whole, torch.cat(severity))


# ---- made here ---------------------------------------------------------------------------------


def generator_version() -> str:
    """Which generator makes images.

    Raises:
        ValueError: ``path: ...``: it is not installed.
    """
    try:
        return f"{GENERATOR} {importlib.metadata.version(GENERATOR)}"
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"path: not given, so images are corrupted here, which needs the package {GENERATOR}: "
            'pip install -e ".[corruptions]", or give published images'
        ) from None


def check_generated(like: ImageSet) -> None:
    """See whether the generator is there, and takes such images.

    Raises:
        ValueError: ``path: ...``.
    """
    generator_version()
    channels, height, width = like.shape
    if channels != 3 or min(height, width) < _SMALLEST:
        raise ValueError(
            f"path: not given, and {GENERATOR} corrupts colour images of at least {_SMALLEST} x "
            f"{_SMALLEST}, not {by(like.shape)}"
        )


class GeneratedImages:
    """Test images under one corruption, each at each severity: made when they are asked for.

    What is drawn follows from the seed, the corruption, the severity and the image's place in the
    set. A process keeps up to 1 GiB of what it has made: digests and verdicts ask for it twice.

    Args:
        images: [N, 3, H, W], taken as 8 bits a channel.
        number: The first so many of them.
        seed: Of the draws.
    """

    def __init__(
        self, images: ImageSet, name: str, severities: Sequence[int], number: int, seed: int
    ) -> None:
        self.clean, self.name, self.severities = images, name, tuple(severities)
        self.files = images if isinstance(images, FileImages) else None
        self.number, self.seed = number, seed
        self.shape = images.shape
        self.labels = images.labels[:number].repeat(len(severities))
        self._made: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> ImageSet:
        raise ValueError("generated images are not chosen from")

    def pooled(self, other: Any) -> ImageSet:
        raise ValueError("generated images are not pooled")

    def batches(
        self, index_batches: Iterable[Tensor], device: torch.device, epoch: int | None = None
    ) -> Iterator[Batch]:
        """See ``ImageSet``; images from files are corrupted by the workers that decode them."""
        asked = [indices.tolist() for indices in index_batches]
        new = [torch.tensor(part) for part in asked if not self._made.keys() >= set(part)]
        workers = 0 if self.files is None else self.files.settings.num_workers
        made = loaded(_Made(self), new, workers, torch.device("cpu"))
        for part in asked:
            if self._made.keys() >= set(part):
                pixels = torch.stack([self._made[index] for index in part])
            else:
                pixels, _ = next(made)
                if (len(self._made) + len(part)) * pixels[0].numel() <= _KEPT:
                    self._made |= dict(zip(part, pixels, strict=True))
            yield pixels.to(device).float() / 255, self.labels[part].to(device)


class _Made(Dataset):
    """Generated images as uint8, one at a time."""

    def __init__(self, images: GeneratedImages) -> None:
        self.images = images
        self.decoded = None if images.files is None else Decoded(images.files, None)

    def __getitem__(self, index: int) -> "tuple[Tensor, int] | UnusableImage":
        own = self.images
        at, place = divmod(index, own.number)
        if self.decoded is not None:
            found = self.decoded[place]
            if isinstance(found, UnusableImage):
                return found
            x = found[0]
        else:
            ((batch, _),) = own.clean.batches([torch.tensor([place])], torch.device("cpu"))
            x = batch[0]
        pixels = (255 * x).round().byte().permute(1, 2, 0).numpy()
        key = (own.seed, own.severities[at], place, *own.name.encode())
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        from imagecorruptions import corrupt, corruptions  # an extra, checked before

        function = getattr(corruptions, own.name)
        own_seed = {"seed": seed} if "seed" in inspect.signature(function).parameters else {}
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed)  # noqa: NPY002
        try:
            corrupted = corrupt(
                pixels, corruption_name=own.name, severity=own.severities[at], **own_seed
            )
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return torch.from_numpy(corrupted).permute(2, 0, 1).contiguous(), int(own.labels[index])
