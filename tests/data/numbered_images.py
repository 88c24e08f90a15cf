"""Images whose pixels tell their number, files of them, and what arrives of them."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robust_accel.data import DataSettings, ImageSet, MemoryImages

CPU = torch.device("cpu")


def image(number: int, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> Image.Image:
    """A picture whose pixels tell its number."""
    rng = np.random.default_rng(number)
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    pixels.flat[0] = number
    return Image.fromarray(pixels)


def write_parquet(
    folder: Path,
    split: str,
    images: list[Image.Image | None],
    labels: list[Any] | None = None,
    features: dict[str, Any] | None = None,
    **columns: list[Any],
) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    if labels is None:
        labels = [i % 3 for i in range(len(images))]
    spec = {"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)} | (features or {})
    rows = {"img": images, "label": labels} | columns
    path = folder / f"{split}.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(spec)).to_parquet(path)
    return path


def pair(folder: Path, **options: Any) -> Path:
    """A folder with 12 training and 6 test images, the numbers 0 to 11 and 100 to 105."""
    write_parquet(folder, "train", [image(i) for i in range(12)], **options)
    write_parquet(folder, "test", [image(100 + i) for i in range(6)], **options)
    return folder


def settings(path: str | Path, **options: Any) -> DataSettings:
    return DataSettings(path=str(path), **options)


def numbers(images: ImageSet) -> list[int]:
    """The numbers that ``image`` wrote into the first pixel."""
    assert isinstance(images, MemoryImages)
    return images.images[:, 0, 0, 0].tolist()


def pixels(images: ImageSet, index_batches: list[list[int]], epoch: int | None) -> Tensor:
    """Images as batches deliver them, put back by index."""
    found: dict[int, Tensor] = {}
    batches = images.batches([torch.tensor(batch) for batch in index_batches], CPU, epoch)
    for indices, (x, labels) in zip(index_batches, batches, strict=True):
        assert labels.tolist() == images.labels[indices].tolist()
        found |= dict(zip(indices, x, strict=True))
    return torch.stack([found[i] for i in sorted(found)])
