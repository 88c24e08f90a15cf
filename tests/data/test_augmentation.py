"""How an image is augmented follows from seed, epoch and index alone."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numbered_images import image, pixels, settings, write_parquet
from torch import Tensor

from robust_accel.data import FileImages, ImageSet, MemoryImages, crop_flip, load_test

# ---- in memory ---------------------------------------------------------------------------------


def reference_crop_flip(x: Tensor, row: int, column: int, flip: int) -> Tensor:
    """Pixel by pixel: where does each come from?"""
    channels, height, width = x.shape
    out = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            source_i = i + row - 4
            source_j = (width - 1 - j if flip else j) + column - 4
            if 0 <= source_i < height and 0 <= source_j < width:
                for c in range(channels):
                    out[c, i, j] = x[c, source_i, source_j]
    return out


def test_crop_flip_is_the_slow_loop() -> None:
    x = torch.randint(0, 256, (24, 2, 5, 6), dtype=torch.uint8)
    corners = [
        [row, column, flip] for row in (0, 4, 8) for column in (0, 3, 4, 8) for flip in (0, 1)
    ]
    expected = torch.stack([reference_crop_flip(x[i], *draw) for i, draw in enumerate(corners)])
    assert crop_flip(x, torch.tensor(corners)).equal(expected)


@pytest.fixture
def in_memory() -> MemoryImages:
    pictures = torch.randint(1, 256, (400, 1, 6, 6), dtype=torch.uint8)
    return MemoryImages(pictures, torch.arange(400) % 7, augment=True, seed=3)


def test_memory_augmentation_depends_on_epoch_and_index_alone(in_memory: MemoryImages) -> None:
    whole = pixels(in_memory, [list(range(400))], epoch=2)
    order = torch.randperm(400).split(7)
    assert pixels(in_memory, [part.tolist() for part in order], epoch=2).equal(whole)
    assert not pixels(in_memory, [list(range(400))], epoch=3).equal(whole)
    other = MemoryImages(in_memory.images, in_memory.labels, augment=True, seed=4)
    assert not pixels(other, [list(range(400))], epoch=2).equal(whole)
    plain = in_memory.images.float() / 255
    assert pixels(in_memory, [list(range(400))], epoch=None).equal(plain)
    assert not whole.equal(plain)


def test_crops_and_mirrors_are_drawn_uniformly(in_memory: MemoryImages) -> None:
    """A marked middle pixel is where the draw put it: 81 places x 2."""
    marked = torch.zeros(4000, 1, 10, 9, dtype=torch.uint8)
    marked[:, :, 5, 4] = 255
    marked[:, :, 5, 5] = 51  # right of it, left of it once mirrored
    images = MemoryImages(marked, torch.zeros(4000, dtype=torch.int64), augment=True)
    x = pixels(images, [list(range(4000))], epoch=0)[:, 0]
    rows = (x == 1).any(dim=2).float().argmax(dim=1)
    assert sorted(rows.unique().tolist()) == list(range(1, 10))
    counts = rows.bincount(minlength=10)[1:]
    assert (counts - 4000 / 9).abs().max() < 5 * (4000 / 9) ** 0.5
    columns = (x == 1).any(dim=1).float().argmax(dim=1)
    assert sorted(columns.unique().tolist()) == list(range(9))
    inside = (columns > 0) & (columns < 8)
    right = x[torch.arange(4000), rows, (columns + 1).clamp(max=8)] > 0
    num_inside = int(inside.sum())
    assert abs(int((inside & right).sum()) - num_inside / 2) < 5 * (num_inside / 4) ** 0.5


# ---- from files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    sized = [image(i, size=(20 + i, 30 - i)) for i in range(12)]
    return write_parquet(folder, "train", [*sized])  # type: ignore[list-item]


def from_files(
    path: Path, *, num_workers: int = 0, augment: str = "timm", seed: int = 0
) -> ImageSet:
    options: dict[str, Any] = {"in_memory": False, "image_size": 16, "augment": augment}
    options |= {"num_workers": num_workers, "test_split": "train"}
    images = load_test(settings(path, **options)).images
    assert isinstance(images, FileImages)
    return FileImages(images.pictures, images.labels, images.settings, seed)


def test_file_augmentation_depends_on_epoch_and_index_alone(photos: Path) -> None:
    one = from_files(photos)
    whole = pixels(one, [list(range(12))], epoch=1)
    assert whole.shape == (12, 3, 16, 16)
    assert 0 <= whole.min() < whole.max() <= 1
    assert pixels(one, [[5, 3], [11, 0, 1, 2], [4, 6, 7, 8, 9, 10]], epoch=1).equal(whole)
    assert not pixels(one, [list(range(12))], epoch=2).equal(whole)
    assert not pixels(from_files(photos, seed=1), [list(range(12))], epoch=1).equal(whole)
    workers = from_files(photos, num_workers=2)
    assert pixels(workers, [[7, 8, 9, 10, 11], [6, 5, 4, 3, 2, 1, 0]], epoch=1).equal(whole)


def test_images_from_files_are_plain_without_epoch_or_augmentation(photos: Path) -> None:
    images = from_files(photos)
    batches = [[0, 1, 2], [3, 4]]
    plain = pixels(images, batches, epoch=None)
    assert pixels(from_files(photos, augment="none"), batches, epoch=4).equal(plain)
    assert not pixels(images, batches, epoch=4).equal(plain)
    subset = images.subset(torch.tensor([4, 2]))
    assert subset.labels.tolist() == [1, 2]
    assert pixels(subset, [[0, 1]], epoch=None).equal(plain[[4, 2]])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_files_leaves_the_random_streams_of_the_attacks_alone(
    photos: Path, num_workers: int
) -> None:
    images = from_files(photos, num_workers=num_workers)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr] # noqa: NPY002
    pixels(images, [[0, 1], [2]], epoch=0)
    assert torch.get_rng_state().equal(before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # type: ignore[index,union-attr] # noqa: NPY002
