"""Images arrive as declared; who gets which image, and how augmented, follows from seeds alone."""

import os
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from robust_accel.data import (
    Data,
    DataSettings,
    FileImages,
    ImageSet,
    MemoryImages,
    Sampler,
    crop_flip,
    load_data,
    load_test,
)

CPU = torch.device("cpu")
CIFAR = (
    Path(__file__).parent.parent.parent
    / os.environ.get("ROBUST_ACCEL_DATA", "../shared/data")
    / "cifar10"
    / "test-00000-of-00001.parquet"
)


@pytest.fixture(autouse=True)
def _cache_in_tmp(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


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


# ---- digits ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(settings("sklearn:digits"))


def test_digits_have_stratified_splits_in_range(digits: Data) -> None:
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1437, 0, 360)
    assert (digits.num_classes, digits.shape) == (10, (1, 8, 8))
    shares = [
        split.labels.bincount(minlength=10) / len(split) for split in (digits.train, digits.test)
    ]
    torch.testing.assert_close(shares[0], shares[1], atol=0.003, rtol=0)
    ((x, labels),) = digits.test.batches([torch.arange(360)], CPU)
    assert (x.dtype, x.min().item(), x.max().item()) == (torch.float32, 0, 1)
    assert labels.dtype == torch.int64


def test_train_validation_and_test_are_disjoint_and_nothing_is_lost(digits: Data) -> None:
    # digits has no two equal images, so rows tell images apart
    held = load_data(settings("sklearn:digits", validation_size=0.1))
    parts = [as_set(split) for split in (held.train, held.validation, held.test)]
    assert [len(part) for part in parts] == [1437 - 144, 144, 360]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert parts[0] | parts[1] == as_set(digits.train)


def as_set(images: ImageSet) -> set[bytes]:
    assert isinstance(images, MemoryImages)
    return {row.numpy().tobytes() for row in images.images}


# ---- parquet and folders -----------------------------------------------------------------------


def test_parquet_folder_gives_the_pixels_that_were_written(tmp_path: Path) -> None:
    data = load_data(settings(pair(tmp_path)))
    assert (data.shape, data.num_classes) == ((3, 5, 6), 3)
    assert sorted(numbers(data.train)) == list(range(12))
    assert numbers(data.test) == list(range(100, 106))
    for index, number in enumerate(numbers(data.train)):
        ((x, label),) = data.train.batches([torch.tensor([index])], CPU)
        expected = torch.from_numpy(np.array(image(number))).permute(2, 0, 1) / 255
        torch.testing.assert_close(x[0], expected, atol=0, rtol=0)
        assert label.item() == number % 3


def test_one_parquet_file_and_its_only_split(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, "only", [image(i) for i in range(4)])
    images, num_classes = load_test(settings(path, test_split="train"))
    assert (numbers(images), num_classes) == ([0, 1, 2, 3], 3)
    with pytest.raises(ValueError, match=r"^test_split: .* no split 'test'; it has \['train'\]"):
        load_data(settings(path))
    with pytest.raises(ValueError, match=r"^train_split: .* no split 'tarin'"):
        load_data(settings(path, train_split="tarin", test_split="train"))


def test_image_folders_take_their_classes_from_the_folders(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 1)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image(10 * (name == "dog") + i).save(folder / f"{i}.png")
    data = load_data(settings(tmp_path))
    assert data.num_classes == 2
    assert dict(zip(numbers(data.train), data.train.labels.tolist(), strict=True)) == {
        0: 0, 1: 0, 2: 0, 10: 1, 11: 1, 12: 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["nowhere.parquet", "nowhere/at_all"])
def test_a_missing_path_is_said_to_be_missing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^path: .*nowhere.*no such local path"):
        load_data(settings(tmp_path / name))


def test_grey_stays_one_channel_unless_some_images_have_colour(tmp_path: Path) -> None:
    grey = [image(i, mode="L") for i in range(3)]
    path = write_parquet(tmp_path, "grey", grey)
    images, _ = load_test(settings(path, test_split="train"))
    assert images.shape == (1, 5, 6)
    assert isinstance(images, MemoryImages)
    assert images.images[1, 0].tolist() == np.asarray(grey[1]).tolist()
    # the first image must not decide that the others lose their colour
    path = write_parquet(tmp_path, "mixed", [grey[0], image(1), grey[2]])
    images, _ = load_test(settings(path, test_split="train"))
    assert images.shape == (3, 5, 6)
    assert isinstance(images, MemoryImages)
    assert images.images[0].tolist() == [np.asarray(grey[0]).tolist()] * 3
    assert images.images[1].tolist() == np.asarray(image(1)).transpose(2, 0, 1).tolist()


def test_splits_of_different_shape_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path, "train", [image(0)])
    write_parquet(tmp_path, "test", [image(1, mode="L")])
    with pytest.raises(ValueError, match=r"^path: images of split train are 3x5x6, .* 1x5x6"):
        load_data(settings(tmp_path))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (image(2, size=(7, 5)), r"^path: image 2 of split train of .* is 5x7, the first is 5x6"),
        (None, r"^path: image 2 of split train of .* is missing"),
    ],
)
def test_an_image_unlike_the_others_is_named(
    tmp_path: Path, bad: Image.Image | None, message: str
) -> None:
    path = write_parquet(tmp_path, "train", [image(0), image(1), bad])
    with pytest.raises(ValueError, match=message):
        load_test(settings(path, test_split="train"))


INT, TEXT, FLOAT = (datasets.Value(name) for name in ("int32", "string", "float32"))


@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        ({"other": datasets.Image()}, {}, r"^image_column: name the column; \['img', 'other'\]"),
        ({"other": datasets.ClassLabel(num_classes=3)}, {}, r"^label_column: .*'label', 'other'"),
        ({}, {"image_column": "imgs"}, r"^image_column: there is no column 'imgs'"),
        ({}, {"label_column": "y"}, r"^label_column: there is no column 'y'"),
        ({"other": TEXT}, {"label_column": "other"}, r"^label_column: 'other' holds no integers"),
        ({"other": FLOAT}, {"label_column": "other"}, r"^label_column: 'other' holds no integers"),
        ({"other": TEXT}, {"image_column": "other"}, r"^image_column: 'other' holds no images"),
        ({"label": TEXT}, {}, r"^label_column: name the column; none would do"),
        ({"label": FLOAT, "a": INT, "b": INT}, {}, r"^label_column: .*\['a', 'b'\] would do"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_told_are_asked_for(
    tmp_path: Path, extra: dict[str, Any], options: dict[str, str], message: str
) -> None:
    values = {"string": ["1", "0"], "int32": [1, 0], "float32": [1.5, 0.0], "int64": [1, 0]}
    filled = {
        name: [image(0), image(1)] if isinstance(f, datasets.Image) else values[f.dtype]
        for name, f in extra.items()
    }
    labels = filled.pop("label", [0, 1])
    path = write_parquet(tmp_path, "train", [image(0), image(1)], labels, extra, **filled)
    with pytest.raises(ValueError, match=message):
        load_test(settings(path, test_split="train", **options))


def test_columns_are_found_by_type_and_may_be_named(tmp_path: Path) -> None:
    features = {"label": INT, "coarse": INT, "thumb": datasets.Image()}
    columns = {"coarse": [4, 5], "thumb": [image(7, (2, 2)), image(8, (2, 2))]}
    path = write_parquet(tmp_path, "train", [image(0), image(1)], [1, 0], features, **columns)
    images, num_classes = load_test(settings(path, test_split="train", image_column="img"))
    assert (images.labels.tolist(), num_classes, images.shape) == ([1, 0], 2, (3, 5, 6))
    named = {"image_column": "thumb", "label_column": "coarse"}
    images, num_classes = load_test(settings(path, test_split="train", **named))
    assert (images.labels.tolist(), num_classes, images.shape) == ([4, 5], 6, (3, 2, 2))


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, -1], INT, r"labels from -1 to 0, allowed are 0 to 0"),
        ([0, -1], datasets.ClassLabel(num_classes=3), r"labels from -1 to 0, allowed are 0 to 2"),
        ([0, None], INT, r"'label' has no label in row 1"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_labels_out_of_range_are_refused(
    tmp_path: Path, labels: list[Any], feature: Any, message: str, in_memory: bool
) -> None:
    images: list[Image.Image | None] = [image(0), image(1)]
    path = write_parquet(tmp_path, "train", images, labels, {"label": feature})
    options = {"in_memory": in_memory, "image_size": None if in_memory else 4}
    with pytest.raises(ValueError, match=rf"^label_column: .*{message}"):
        load_test(settings(path, test_split="train", **options))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    folder = pair(tmp_path)
    write_parquet(folder, "test", [])
    with pytest.raises(ValueError, match=r"^path: .*(holds no image|no data)"):
        load_data(settings(folder))


# ---- sizes -------------------------------------------------------------------------------------


def test_sizes_choose_the_same_images_whatever_the_seed(tmp_path: Path) -> None:
    sizes = {"train_size": 8, "test_size": 4, "validation_size": 0.25}
    one, two = (load_data(settings(pair(tmp_path), **sizes), seed=seed) for seed in (0, 1))
    assert (len(one.train), len(one.validation), len(one.test)) == (6, 2, 4)
    counted = load_data(settings(tmp_path, **sizes | {"validation_size": 2}))
    assert numbers(counted.validation) == numbers(one.validation)
    chosen = numbers(one.train) + numbers(one.validation)
    assert len({*chosen}) == 8
    assert {*chosen} < {*range(12)}
    assert {*numbers(one.test)} < {*range(100, 106)}
    for split in ("train", "validation", "test"):
        assert numbers(getattr(one, split)) == numbers(getattr(two, split))
    # evaluation alone measures the same images as training's end
    assert numbers(load_test(settings(tmp_path, **sizes))[0]) == numbers(one.test)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 13}, r"^train_size: 13 exceeds the 12 images"),
        ({"test_size": 7}, r"^test_size: 7 exceeds the 6 images"),
        ({"validation_size": 12}, r"^validation_size: 12 leaves none of 12"),
        ({"validation_size": 0.99}, r"^validation_size: 0.99 leaves none of 12"),
        ({"validation_size": 0.01}, r"^validation_size: 0.01 of 12 images is not one image"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(settings(pair(tmp_path), **options))


@pytest.mark.parametrize(
    "options",
    [
        {"augment": "timm"},
        {"augment": "crop_flip", "in_memory": False, "image_size": 8},
        {"in_memory": False},
        {"image_size": 8},
        {"validation_size": 1.5},
        {"colour": 1},
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataSettings(path="x", **options)


@pytest.mark.skipif(not CIFAR.exists(), reason=f"no CIFAR-10 at {CIFAR}")
def test_cifar10_as_the_hub_stores_it(tmp_path: Path) -> None:
    rows = datasets.load_dataset("parquet", data_files=str(CIFAR), split="train")
    rows.select(range(500)).to_parquet(tmp_path / "500.parquet")  # the hub's own bytes and schema
    images, num_classes = load_test(settings(tmp_path / "500.parquet", test_split="train"))
    assert (len(images), images.shape, num_classes) == (500, (3, 32, 32), 10)
    assert len(images.labels.unique()) == 10
    ((x, _),) = images.batches([torch.arange(500)], CPU)
    # the mean of CIFAR-10's pixels, as every paper has it
    torch.testing.assert_close(
        x.mean(dim=(0, 2, 3)), torch.tensor([0.491, 0.482, 0.447]), atol=0.02, rtol=0
    )


# ---- augmentation in memory --------------------------------------------------------------------


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


# ---- augmentation from files -------------------------------------------------------------------


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
    (
        images,
        _,
    ) = load_test(settings(path, **options))
    assert isinstance(images, FileImages)
    return FileImages(images.rows, images.labels, images.settings, seed)


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


# ---- who gets which image ----------------------------------------------------------------------


def deal(
    epoch: int, world_size: int = 1, first_step: int = 0, **options: Any
) -> list[list[Tensor]]:
    """[rank][micro-batch] of 103 images in steps of 8."""
    return [
        list(Sampler(103, 8, rank=rank, world_size=world_size, **options).epoch(epoch, first_step))
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("sharding", ["global", "fixed"])
@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_epoch_gives_every_image_to_at_most_one_process_once(
    world_size: int, num_micro: int, sharding: str
) -> None:
    dealt = deal(5, world_size, num_micro=num_micro, sharding=sharding)
    for micro_batches in dealt:
        assert len(micro_batches) == 12 * num_micro  # 103 images make 12 steps of 8
        assert {len(batch) for batch in micro_batches} == {8 // num_micro // world_size}
    used = torch.cat([batch for micro_batches in dealt for batch in micro_batches])
    assert len(used.unique()) == len(used) == 96
    assert {*used.tolist()} <= {*range(103)}


def test_a_steps_images_do_not_depend_on_the_number_of_processes_or_micro_batches() -> None:
    def steps(world_size: int, num_micro: int) -> list[list[int]]:
        dealt = deal(1, world_size, num_micro=num_micro)
        return [
            sorted(
                torch.cat(
                    [b for r in dealt for b in r[s * num_micro : (s + 1) * num_micro]]
                ).tolist()
            )
            for s in range(12)
        ]

    assert steps(1, 1) == steps(2, 1) == steps(4, 1) == steps(2, 2) == steps(1, 4)


@pytest.mark.parametrize("sharding", ["global", "fixed"])
def test_epochs_and_seeds_differ_and_repeat(sharding: str) -> None:
    def order(epoch: int, seed: int = 0) -> list[int]:
        return torch.cat(deal(epoch, 2, seed=seed, sharding=sharding)[1]).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert order(1) != order(1, seed=1)


def test_fixed_shards_stay_with_their_process() -> None:
    def shards(sharding: str, rank: int) -> set[int]:
        """What a rank sees in 12 epochs: each leaves out other images of its shard."""
        batches = [b for epoch in range(12) for b in deal(epoch, 2, sharding=sharding)[rank]]
        return {*torch.cat(batches).tolist()}

    fixed = [shards("fixed", rank) for rank in (0, 1)]
    assert fixed[0].isdisjoint(fixed[1])
    assert fixed[0] | fixed[1] == {*range(103)}
    assert shards("global", 0) == {*range(103)}


@pytest.mark.parametrize("sharding", ["global", "fixed"])
def test_resuming_gives_the_tail(sharding: str) -> None:
    options: dict[str, Any] = {"num_micro": 2, "sharding": sharding}
    whole, tail = deal(3, 2, **options), deal(3, 2, first_step=5, **options)
    for rank in (0, 1):
        assert [b.tolist() for b in tail[rank]] == [b.tolist() for b in whole[rank][10:]]
    assert not any(deal(3, 2, first_step=12, **options))


def test_batch_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^batch_size: 8 .* 3 processes x 1 micro-batches"):
        Sampler(103, 8, world_size=3)
    with pytest.raises(ValueError, match=r"^batch_size: 8 .* 4 processes x 4 micro-batches"):
        Sampler(103, 8, world_size=4, num_micro=4)
    with pytest.raises(ValueError, match=r"^batch_size: 104 exceeds the 103"):
        Sampler(103, 104)
    assert Sampler(103, 103).steps_per_epoch == 1
