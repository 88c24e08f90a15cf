"""How an image is augmented follows from seed, epoch and index alone."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numbered_images import image, pixels, settings, write_parquet
from torch import Tensor
from torchvision.transforms import v2

from robust_accel.data import FileImages, ImageSet, MemoryImages, augmented, load_test
from robust_accel.data.augmentation import seeded
from robust_accel.data.batch_augmentation import BatchAugmentation

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
    assert augmented(x, torch.tensor(corners), "crop_flip").equal(expected)
    expected = torch.stack([reference_crop_flip(x[i], 4, 4, d[2]) for i, d in enumerate(corners)])
    assert augmented(x, torch.tensor(corners), "flip").equal(expected)


@pytest.fixture
def in_memory() -> MemoryImages:
    pictures = torch.randint(1, 256, (400, 1, 6, 6), dtype=torch.uint8)
    return MemoryImages(pictures, torch.arange(400) % 7, BatchAugmentation("crop_flip", 3))


def test_memory_augmentation_depends_on_epoch_and_index_alone(in_memory: MemoryImages) -> None:
    whole = pixels(in_memory, [list(range(400))], epoch=2)
    order = torch.randperm(400).split(7)
    assert pixels(in_memory, [part.tolist() for part in order], epoch=2).equal(whole)
    assert not pixels(in_memory, [list(range(400))], epoch=3).equal(whole)
    other = MemoryImages(in_memory.images, in_memory.labels, BatchAugmentation("crop_flip", 4))
    assert not pixels(other, [list(range(400))], epoch=2).equal(whole)
    plain = in_memory.images.float() / 255
    assert pixels(in_memory, [list(range(400))], epoch=None).equal(plain)
    assert not whole.equal(plain)


def test_crops_and_mirrors_are_drawn_uniformly(in_memory: MemoryImages) -> None:
    """A marked middle pixel is where the draw put it: 81 places x 2."""
    marked = torch.zeros(4000, 1, 10, 9, dtype=torch.uint8)
    marked[:, :, 5, 4] = 255
    marked[:, :, 5, 5] = 51  # right of it, left of it once mirrored
    images = MemoryImages(marked, torch.zeros(4000).long(), BatchAugmentation("crop_flip"))
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


POLICIES = ["rand", "trivial", "auto_cifar10", "auto_imagenet", "auto_svhn"]


def configured(images: MemoryImages, seed: int = 3, **options: Any) -> MemoryImages:
    return MemoryImages.of(images.images, images.labels, settings("x", **options), seed)


@pytest.mark.parametrize(
    "options",
    [*({"policy": policy} for policy in POLICIES), {"cutout": 2}, {"cutout": 2, "policy": "rand"}],
    ids=str,
)
@pytest.mark.parametrize("augment", ["none", "flip", "crop_flip", "resized_crop_flip"])
def test_policies_and_cutout_depend_on_epoch_and_index_alone(
    in_memory: MemoryImages, options: dict[str, Any], augment: str
) -> None:
    few = in_memory.subset(torch.arange(30))
    images, without = (configured(few, augment=augment, **more) for more in (options, {}))
    before = torch.get_rng_state(), random.getstate()
    whole = pixels(images, [list(range(30))], epoch=2)
    assert torch.get_rng_state().equal(before[0]) and random.getstate() == before[1]
    order = torch.randperm(30).split(7)
    assert pixels(images, [part.tolist() for part in order], epoch=2).equal(whole)
    assert not pixels(images, [list(range(30))], epoch=3).equal(whole)
    other = configured(few, 4, augment=augment, **options)
    assert not pixels(other, [list(range(30))], epoch=2).equal(whole)
    assert not pixels(without, [list(range(30))], epoch=2).equal(whole)
    assert pixels(images, [list(range(30))], epoch=None).equal(few.images.float() / 255)
    assert 0 <= whole.min() < whole.max() <= 1
    if augment in ("none", "resized_crop_flip"):  # shifts are drawn for as many images as there are
        assert pixels(images.subset(torch.arange(9)), [[3]], epoch=2).equal(whole[[3]])


def test_a_policy_is_torchvisions_own(in_memory: MemoryImages) -> None:
    images = configured(in_memory.subset(torch.arange(20)), policy="trivial")
    found = pixels(images, [list(range(20))], epoch=5)
    for index in range(20):
        with seeded(3, 5, index):
            expected = v2.TrivialAugmentWide()(images.images[index])
        assert found[index].equal(expected.float() / 255)


def test_cutout_is_one_square_inside_the_image_anywhere() -> None:
    white = MemoryImages(
        torch.full((600, 3, 7, 9), 255, dtype=torch.uint8), torch.zeros(600).long()
    )
    x = pixels(configured(white, cutout=3), [list(range(600))], epoch=0)
    black = x.eq(0).all(dim=1)
    assert x[~black[:, None].expand_as(x)].eq(1).all()
    assert black.sum(dim=(1, 2)).eq(9).all()
    rows, columns = black.any(dim=2), black.any(dim=1)
    assert rows.sum(dim=1).eq(3).all() and columns.sum(dim=1).eq(3).all()
    corners = torch.stack([rows.int().argmax(dim=1), columns.int().argmax(dim=1)], dim=1)
    assert len(corners.unique(dim=0)) == 5 * 7  # all places there are


def test_a_square_as_large_as_the_image_is_refused(in_memory: MemoryImages) -> None:
    with pytest.raises(
        ValueError, match=r"^cutout: a square of 6 x 6 is not smaller than .* 6 x 6"
    ):
        configured(in_memory, cutout=6)
    with pytest.raises(ValueError, match=r"cutout: a square of 16 x 16 is not smaller than"):
        settings("x", cutout=16, in_memory=False, image_size=16)


# ---- from files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    sized = [image(i, size=(20 + i, 30 - i)) for i in range(12)]
    return write_parquet(folder, "train", [*sized])  # type: ignore[list-item]


def from_files(
    path: Path, *, num_workers: int = 0, augment: str = "timm", seed: int = 0, **more: Any
) -> ImageSet:
    options: dict[str, Any] = {"in_memory": False, "image_size": 16, "augment": augment} | more
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


@pytest.mark.parametrize("augment", ["none", "timm"])
def test_policies_and_cutout_of_files_are_torchvisions_after_timms(
    photos: Path, augment: str
) -> None:
    more: dict[str, Any] = {"policy": "rand", "cutout": 4}
    images = from_files(photos, augment=augment, **more)
    whole = pixels(images, [list(range(12))], epoch=1)
    before = torch.get_rng_state()
    workers = from_files(photos, augment=augment, num_workers=2, **more)
    assert pixels(workers, [[7, 8, 9, 10, 11], [6, 5, 4, 3, 2, 1, 0]], epoch=1).equal(whole)
    assert torch.get_rng_state().equal(before)
    black = whole.eq(0).all(dim=1)
    assert black.sum(dim=(1, 2)).ge(16).all()
    assert (255 * whole).round().div(255).equal(whole)  # eight bits, as the policies work on
    plain = from_files(photos, augment=augment)
    assert not pixels(plain, [list(range(12))], epoch=1).equal(whole)
    assert pixels(images, [[3]], epoch=None).equal(pixels(plain, [[3]], epoch=None))


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
