"""Images that are broken: the first is named, or they are left out, counted and said."""

import logging
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from numbered_images import CPU, image, numbers, settings, write_parquet
from picture_folders import truncate, write_folder

from robust_accel.data import load_data, load_test, load_to_label
from robust_accel.data.decoding import UnusableImage, open_image

FILES = {"in_memory": False, "image_size": 5}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Training images 0 to 7, of which 2 is half a file and 5 is text; whole test images."""
    root = tmp_path / "broken"
    files = write_folder(root, "train", {"cat": 4, "dog": 4})
    truncate(files[2])
    files[5].write_text("no image")
    write_folder(root, "test", {"cat": 1, "dog": 1}, start=100)
    return root


def by_pixels(images: Any) -> list[list[float]]:
    """Pixels and label of each image, whatever their order."""
    ((x, labels),) = images.batches([torch.arange(len(images))], CPU)
    return sorted(torch.cat([x.flatten(1), labels[:, None]], dim=1).tolist())


def test_in_memory_the_first_is_named(broken: Path) -> None:
    message = r"^path: image 2 of split train of .*cat/2\.png\) cannot be read \(.*on_bad: skip"
    with pytest.raises(ValueError, match=message):
        load_data(settings(broken))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_from_files_the_first_is_named_in_one_sentence(broken: Path, num_workers: int) -> None:
    of_train = settings(broken, test_split="train", num_workers=num_workers, **FILES)
    images = load_test(of_train).images
    assert len(list(images.batches([torch.tensor([0, 1])], CPU))) == 1
    with pytest.raises(
        ValueError, match=r"^data\.path: image 5 of split train .*dog/5\.png"
    ) as caught:
        list(images.batches([torch.tensor([0, 1]), torch.tensor([4, 5])], CPU, 0))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("options", [{}, {**FILES, "num_workers": 0}, {**FILES, "num_workers": 2}])
def test_skipped_images_are_counted_named_and_all_others_keep_their_labels(
    broken: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    data = load_data(settings(broken, on_bad="skip", **options))
    assert sorted(data.train.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert re.match(r"2 of 8 images are left out \(data.on_bad: skip\): image 2 .*cat/2.png", said)
    assert "dog/5.png" in said
    assert data.selection == "all"
    for file in (broken / "train" / "cat" / "2.png", broken / "train" / "dog" / "5.png"):
        file.unlink()
    assert by_pixels(data.train) == by_pixels(load_data(settings(broken, **options)).train)


def test_what_is_measured_says_how_many_are_left_out(broken: Path) -> None:
    of_train = settings(broken, on_bad="skip", test_split="train")
    assert load_test(of_train).selection == "all, 2 bad left out"
    listed = load_test(of_train, ids=(3, 2))
    assert (numbers(listed.images), listed.selection) == (
        [3],
        "2 listed ids (5bbe4d141309), 1 bad left out",
    )


def test_a_missing_image_is_skipped_like_a_damaged_one(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, "train", [image(0), None, image(2)])
    images = load_test(settings(path, test_split="train", on_bad="skip")).images
    assert (numbers(images), images.labels.tolist()) == ([0, 2], [0, 2])
    files = settings(path, test_split="train", **FILES, num_workers=0)
    with pytest.raises(ValueError, match=r"^data\.path: image 1 of split train of .* is missing"):
        list(load_test(files).images.batches([torch.arange(3)], CPU))


def test_rows_to_label_are_those_that_training_leaves_out(broken: Path) -> None:
    options = {"on_bad": "skip", "train_size": 3}
    rows, images = load_to_label(settings(broken, **options))
    rest = load_data(settings(broken, **options, unlabeled={})).unlabeled
    assert numbers(images) == numbers(rest)
    assert [row["image"].getpixel((0, 0))[0] for row in rows] == numbers(images)


def test_unlabeled_images_are_skipped_with_their_labels(broken: Path, tmp_path: Path) -> None:
    own = {"path": str(broken), "label_column": "label"}
    whole = tmp_path / "whole"
    write_folder(whole, "train", {"cat": 2, "dog": 2})
    write_folder(whole, "test", {"cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=r"^unlabeled\.path: image 2 of split train"):
        load_data(settings(whole, unlabeled=own))
    unlabeled = load_data(settings(whole, unlabeled=own, on_bad="skip")).unlabeled
    assert numbers(unlabeled) == [0, 1, 3, 4, 6, 7]
    assert unlabeled.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_an_address_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` would ask for minutes, and again for each image."""
    monkeypatch.setattr("robust_accel.data.decoding._PATIENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/0.png"
        with pytest.raises(UnusableImage, match=r"^cannot be read \(TimeoutError: timed out\)"):
            open_image({"bytes": None, "path": address})
