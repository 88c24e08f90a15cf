"""The digest of images: the same for the same data, another for any change of them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered_images import image, pair, settings
from picture_folders import write_folder

from robust_accel.data import MemoryImages, load_data
from robust_accel.data import images as images_module

KINDS: list[dict[str, Any]] = [{}, {"in_memory": False, "image_size": 5, "num_workers": 0}]


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    write_folder(tmp_path / "pets", "train", {"cat": 6, "dog": 6})
    write_folder(tmp_path / "pets", "test", {"cat": 1, "dog": 1}, start=100)
    return tmp_path / "pets"


def replaced(train: Path) -> None:
    image(77).save(train / "cat" / "3.png")


def grown(train: Path) -> None:
    image(77).save(train / "dog" / "9.png")


def relabelled(train: Path) -> None:
    (train / "cat" / "5.png").rename(train / "dog" / "5.png")


def shrunk(train: Path) -> None:
    (train / "cat" / "5.png").unlink()


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("change", [replaced, grown, relabelled, shrunk])
def test_any_change_of_the_training_images_is_another_identity(
    pets: Path, options: dict[str, Any], change: Any
) -> None:
    before = load_data(settings(pets, **options)).identity()
    assert before["train"]["images"] == 12
    change(pets / "train")
    assert load_data(settings(pets, **options)).identity() != before


@pytest.mark.parametrize("options", KINDS)
def test_a_copy_elsewhere_is_the_same_data(
    pets: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    sizes = {"train_size": 8, "validation_size": 2, "unlabeled": {}}
    before = load_data(settings(pets, **options, **sizes)).identity()
    assert {name: of["images"] for name, of in before.items()} == {
        "train": 6,
        "validation": 2,
        "unlabeled": 4,
    }
    assert len({of["digest"] for of in before.values()}) == 3
    shutil.copytree(pets, tmp_path / "elsewhere")
    assert load_data(settings(tmp_path / "elsewhere", **options, **sizes)).identity() == before
    workers = {"num_workers": 1} if options else {}
    again = load_data(settings(pets, **options | workers, **sizes), seed=5)
    assert again.identity() == before


def test_large_sets_are_known_by_their_sizes_and_some_images(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "HASHED_WHOLE", 100)
    monkeypatch.setattr(images_module, "HASHED_IMAGES", 2)

    def identity() -> dict[str, Any]:
        return load_data(settings(pets, **KINDS[1])).identity()

    before = identity()
    for file in [*(pets / "train").rglob("*.png")][::5]:
        content = file.read_bytes()
        file.write_bytes(content + b"0")  # another size
        assert identity() != before
        file.write_bytes(content)
    assert identity() == before


def test_parquet_and_order(tmp_path: Path) -> None:
    path = pair(tmp_path)
    for options in KINDS:
        train = load_data(settings(path, **options)).train
        found = train.digest()  # type: ignore[attr-defined]
        other = train.subset(torch.arange(12).flip(0))
        assert other.digest() != found  # type: ignore[attr-defined]
        assert other.subset(torch.arange(12).flip(0)).digest() == found  # type: ignore[attr-defined]
        pooled = train.pooled(train)
        assert (len(pooled), pooled.digest() != found) == (24, True)  # type: ignore[attr-defined]


def test_pixels_shape_and_labels_count() -> None:
    pixels = torch.arange(24, dtype=torch.uint8).view(2, 1, 3, 4)
    labels = torch.tensor([0, 1])
    digests = {
        MemoryImages(pixels, labels).digest(),
        MemoryImages(pixels.view(2, 1, 4, 3), labels).digest(),
        MemoryImages(pixels, labels.flip(0)).digest(),
        MemoryImages(pixels.flip(0), labels).digest(),
    }
    assert len(digests) == 4
    strided = pixels.expand(2, 3, 3, 4)
    assert MemoryImages(strided, labels).digest() == MemoryImages(strided.clone(), labels).digest()
