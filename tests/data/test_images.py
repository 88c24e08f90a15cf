"""Images arrive as declared, and what contradicts the declaration is refused by name."""

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from numbered_images import CPU, image, numbers, pair, settings, write_parquet
from PIL import Image

from robust_accel.data import Data, DataSettings, ImageSet, MemoryImages, load_data, load_test
from robust_accel.data.decoding import Source

CIFAR = (
    Path(__file__).parent.parent.parent
    / os.environ.get("ROBUST_ACCEL_DATA", "../shared/data")
    / "cifar10"
    / "test-00000-of-00001.parquet"
)


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
    test = load_test(settings(path, test_split="train"))
    images, num_classes = test.images, test.num_classes
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
    with pytest.raises(
        ValueError, match=r"^path: .*nowhere.*(no such local path|there is no such folder or file)"
    ):
        load_data(settings(tmp_path / name))


def test_grey_stays_one_channel_unless_some_images_have_colour(tmp_path: Path) -> None:
    grey = [image(i, mode="L") for i in range(3)]
    path = write_parquet(tmp_path, "grey", grey)
    images = load_test(settings(path, test_split="train")).images
    assert images.shape == (1, 5, 6)
    assert isinstance(images, MemoryImages)
    assert images.images[1, 0].tolist() == np.asarray(grey[1]).tolist()
    # the first image must not decide that the others lose their colour
    path = write_parquet(tmp_path, "mixed", [grey[0], image(1), grey[2]])
    images = load_test(settings(path, test_split="train")).images
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
        ({"label": TEXT}, {}, r"^label_column: name the column; none holds integers and would do"),
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
    test = load_test(settings(path, test_split="train", image_column="img"))
    images, num_classes = test.images, test.num_classes
    assert (images.labels.tolist(), num_classes, images.shape) == ([1, 0], 2, (3, 5, 6))
    named = {"image_column": "thumb", "label_column": "coarse"}
    test = load_test(settings(path, test_split="train", **named))
    images, num_classes = test.images, test.num_classes
    assert (images.labels.tolist(), num_classes, images.shape) == ([4, 5], 6, (3, 2, 2))


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, -1], INT, r"row 1 of .* the label -1, allowed are 0 to 0"),
        (
            [0, -1],
            datasets.ClassLabel(num_classes=3),
            r"row 1 of .* the label -1, allowed are 0 to 2",
        ),
        ([0, None], INT, r"'label': row 1 of .* has no label"),
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
    assert numbers(load_test(settings(tmp_path, **sizes)).images) == numbers(one.test)


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
        {"augment": "flip", "in_memory": False, "image_size": 8},
        {"augment": "resized_crop_flip", "in_memory": False, "image_size": 8},
        {"crop_scale": 0.5},
        {"crop_scale": 0.5, "augment": "crop_flip"},
        {"crop_scale": 0, "augment": "resized_crop_flip"},
        {"crop_scale": 1.1, "augment": "resized_crop_flip"},
        {"in_memory": False},
        {"image_size": 8},
        {"validation_size": 1.5},
        {"colour": 1},
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DataSettings(path="x", **options)


@pytest.mark.skipif(not CIFAR.exists(), reason=f"no CIFAR-10 at {CIFAR}")
def test_cifar10_as_the_hub_stores_it(tmp_path: Path) -> None:
    rows = datasets.load_dataset("parquet", data_files=str(CIFAR), split="train")
    rows.select(range(500)).to_parquet(tmp_path / "500.parquet")  # the hub's own bytes and schema
    test = load_test(settings(tmp_path / "500.parquet", test_split="train"))
    images, num_classes = test.images, test.num_classes
    assert (len(images), images.shape, num_classes) == (500, (3, 32, 32), 10)
    assert len(images.labels.unique()) == 10
    ((x, _),) = images.batches([torch.arange(500)], CPU)
    # the mean of CIFAR-10's pixels, as every paper has it
    torch.testing.assert_close(
        x.mean(dim=(0, 2, 3)), torch.tensor([0.491, 0.482, 0.447]), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_only_images_that_are_drawn_are_decoded(
    augment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    real = Source.decode

    def counted(self: Source, number: int) -> Image.Image:
        decoded.append(number)
        return real(self, number)

    monkeypatch.setattr(Source, "decode", counted)
    write_parquet(tmp_path, "train", [image(i) for i in range(12)])
    write_parquet(tmp_path, "test", [image(100 + i) for i in range(4)])
    some = {"train_size": 5, "test_size": 2, "augment": augment}
    whole = load_data(settings(str(tmp_path), on_bad="skip", **some))  # draws from what is good
    assert len(decoded) == 16
    decoded.clear()
    drawn = load_data(settings(str(tmp_path), **some))
    assert len(decoded) == 7
    assert drawn.identity() == whole.identity()
    for a, b in ((drawn.train, whole.train), (drawn.test, whole.test)):
        (one, _), (other, _) = (next(x.batches([torch.arange(2)], CPU, 3)) for x in (a, b))
        assert torch.equal(one, other)
    decoded.clear()
    rest = load_data(settings(str(tmp_path), unlabeled={"path": None, "fraction": 0.5}, **some))
    assert len(decoded) == 14
    assert rest.unlabeled is not None and len(rest.unlabeled) == 7
