"""Classes keep their names: whoever numbers them differently is understood, or refused."""

import itertools
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from numbered_images import image, numbers, settings, write_parquet
from picture_folders import write_folder

from robust_accel.data import (
    NO_LABEL,
    Data,
    MemoryImages,
    compared_by_number,
    load_data,
    load_test,
    match_classes,
    renumbered,
)

MODEL = ("cat", "dog", "fox", "owl")


def names_of(images: Any, names: tuple[str, ...]) -> list[str]:
    return [names[i] for i in images.labels.tolist()]


# ---- the mapping -------------------------------------------------------------------------------


def test_every_choice_of_the_models_classes_is_found_by_name() -> None:
    for length in range(1, 5):
        for names in itertools.permutations(MODEL, length):
            positions = match_classes(names, MODEL)
            found = range(length) if positions is None else positions
            assert [MODEL[i] for i in found] == list(names)
            assert (positions is None) == (names == MODEL[:length])
            assert compared_by_number(names, MODEL, num_data=length, num_model=4) is None


def test_names_that_the_model_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^the data has the classes \[elk\], .*\[cat, dog, fox, "):
        match_classes(("cat", "elk"), MODEL)
    with pytest.raises(ValueError, match=r"^mine has the classes \[a\], which yours has not"):
        match_classes(("a",), ("b",), data="mine", model="yours")


AUTOMATIC = tuple(str(i) for i in range(4))


@pytest.mark.parametrize(("data", "model"), [(None, MODEL), (MODEL, None), (AUTOMATIC, MODEL)])
def test_without_names_numbers_are_compared_and_a_sentence_says_so(data: Any, model: Any) -> None:
    numbers = {"num_data": 4, "num_model": 4}
    assert match_classes(data, model, **numbers) is None
    said = compared_by_number(data, model, **numbers)
    who = "the model" if model is None else "the data"
    assert said == (
        f"the model has 4 classes, the data 4: compared by number, for {who} has no class names"
    )
    with pytest.raises(ValueError, match="the data has 5 classes, the model 4"):
        match_classes(data and (*data, "4"), model, num_data=5, num_model=4)


def test_folders_named_by_numbers_are_those_numbers() -> None:
    """Sorted as text, folder 10 comes before folder 2; to whom numbers are names, it is 10."""
    folders = tuple(sorted(str(i) for i in range(11)))
    positions = match_classes(folders, None, num_data=11, num_model=11)
    assert positions is not None
    assert [str(i) for i in positions] == list(folders)
    back = match_classes(None, folders, num_data=11, num_model=11)
    assert back is not None
    assert [folders[i] for i in back] == [str(i) for i in range(11)]


def test_renumbering_keeps_the_images_and_what_has_no_label() -> None:
    images = MemoryImages(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, -1, 2]))
    found = renumbered(images, (2, 0, 1))
    assert found.labels.tolist() == [2, 0, NO_LABEL, 1]
    assert images.labels.tolist() == [0, 1, -1, 2]
    assert found.images is images.images
    assert renumbered(images, None) is images


# ---- names of a data set -----------------------------------------------------------------------


def test_names_come_from_folders_and_from_class_labels_and_not_from_integers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "folders", "train", {"dog": 2, "cat": 2, "owl": 1})
    write_folder(tmp_path / "folders", "test", {"dog": 1, "cat": 1})
    data = load_data(settings(tmp_path / "folders"))
    assert (data.class_names, data.num_classes) == (("cat", "dog", "owl"), 3)
    test = load_test(settings(tmp_path / "folders"))
    assert (test.class_names, test.num_classes, test.selection) == (data.class_names, 3, "all")
    chosen = load_data(settings(tmp_path / "folders", classes=(2, 0)))
    assert chosen.class_names == ("owl", "cat")
    assert sorted(names_of(chosen.train, chosen.class_names)) == ["cat", "cat", "owl"]
    digits = load_data(settings("sklearn:digits"))
    assert digits.class_names == tuple("0123456789")
    assert not caplog.records
    plain = write_parquet(
        tmp_path / "plain", "train", [image(0), image(1)], [0, 1], {"label": datasets.Value("int8")}
    )
    assert load_test(settings(plain, test_split="train")).class_names is None


def named(folder: Path, split: str, names: tuple[str, ...], labels: list[int]) -> Path:
    feature = datasets.ClassLabel(names=list(names))
    return write_parquet(
        folder, split, [image(i) for i in range(len(labels))], labels, {"label": feature}
    )


def test_splits_that_number_their_classes_differently_agree_by_name(tmp_path: Path) -> None:
    """`datasets` reads both by the first file's names, and says nothing."""
    named(tmp_path, "train", ("cat", "dog", "fox"), [0, 1, 2])
    named(tmp_path, "test", ("fox", "cat"), [0, 1, 1, 0])
    data = load_data(settings(tmp_path))
    assert data.class_names == ("cat", "dog", "fox")
    assert names_of(data.test, data.class_names) == ["fox", "cat", "cat", "fox"]
    alone = load_test(settings(tmp_path))
    assert alone.class_names == data.class_names
    assert alone.images.labels.equal(data.test.labels)


def test_a_test_split_of_other_classes_is_refused(tmp_path: Path) -> None:
    named(tmp_path, "train", ("cat", "dog"), [0, 1])
    named(tmp_path, "test", ("cat", "elk"), [0, 1])
    for load in (load_data, load_test):
        with pytest.raises(ValueError, match=r"^test_split: split test .* \[elk\], .*\[cat, dog\]"):
            load(settings(tmp_path))


def test_files_of_one_split_that_name_classes_differently_are_refused(tmp_path: Path) -> None:
    for i, names in enumerate((("cat", "dog"), ("dog", "cat"))):
        named(tmp_path, f"train-{i:05d}-of-00002", names, [0, 1])
    named(tmp_path, "test-00000-of-00001", ("cat", "dog"), [0, 1])
    with pytest.raises(ValueError, match=r"^path: .*of one split and name classes differently"):
        load_data(settings(tmp_path))


# ---- unlabelled images -------------------------------------------------------------------------


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    write_folder(tmp_path / "animals", "train", {"cat": 3, "dog": 3, "owl": 3})
    write_folder(tmp_path / "animals", "test", {"cat": 1, "dog": 1, "owl": 1})
    return tmp_path / "animals"


def with_more(animals: Path, more: Path, **options: Any) -> Data:
    own = {"path": str(more), "label_column": "label"}
    return load_data(settings(animals, unlabeled=own, **options))


def test_labels_of_more_images_are_those_of_their_folders(animals: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "more", "train", {"owl": 2, "dog": 2})
    for options in ({}, {"in_memory": False, "image_size": 5, "num_workers": 0}):
        data = with_more(animals, tmp_path / "more", **options)
        assert names_of(data.unlabeled, data.class_names) == ["dog", "dog", "owl", "owl"]
    chosen = with_more(animals, tmp_path / "more", classes=(2, 1))
    assert chosen.class_names == ("owl", "dog")
    assert names_of(chosen.unlabeled, chosen.class_names) == ["dog", "dog", "owl", "owl"]
    with pytest.raises(ValueError, match=r"^unlabeled\.label_column: .*\[dog\].*\[cat, owl\]"):
        with_more(animals, tmp_path / "more", classes=(0, 2))


def test_more_images_of_other_classes_are_refused(animals: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "more", "train", {"elk": 2, "dog": 2})
    with pytest.raises(ValueError, match=r"^unlabeled\.label_column: .*\[elk\].*\[cat, dog, owl\]"):
        with_more(animals, tmp_path / "more")


def test_numbers_are_compared_with_names_and_said_but_not_across_chosen_classes(
    animals: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = write_parquet(
        tmp_path, "more", [image(0), image(1)], [2, 0], {"label": datasets.Value("int32")}
    )
    data = with_more(animals, plain)
    assert data.unlabeled.labels.tolist() == [2, 0]
    assert "column 'label' of split train of" in caplog.text
    assert "has no class names" in caplog.text
    with pytest.raises(ValueError, match=r"^unlabeled\.label_column: .*numbers classes anew"):
        with_more(animals, plain, classes=(2, 0))


# ---- classes without images --------------------------------------------------------------------


def integers(folder: Path, train: list[int], test: list[int]) -> Path:
    for split, labels in (("train", train), ("test", test)):
        pictures = [image(i) for i in range(len(labels))]
        write_parquet(folder, split, pictures, labels, {"label": datasets.Value("int64")})
    return folder


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        ([1, 2, 3], [1, 2], r"1 of 4 classes .*\[0\].*labels start at 1; data\.classes"),
        ([0, 2, 4], [0], r"2 of 5 classes .*\[1, 3\]: the model gets outputs that nothing trains"),
        ([0, 1], [2], r"1 of 3 classes .*\[2\]"),  # of the test split only
        ([0, 1, 2], [1], None),  # a test split may lack classes
    ],
)
def test_classes_that_nothing_trains_are_said_once(
    tmp_path: Path,
    train: list[int],
    test: list[int],
    said: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = integers(tmp_path, train, test)
    data = load_data(settings(path))
    assert data.num_classes == max(train + test) + 1
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == (said is not None)
    for text in warnings:
        assert re.search(said or "", text)
    assert load_test(settings(path)).num_classes == data.num_classes
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    load_data(settings(path))
    assert not caplog.records


def test_a_folder_of_the_test_split_alone_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, "train", {"cat": 2, "dog": 2})
    write_folder(tmp_path, "test", {"cat": 1, "elk": 1})
    data = load_data(settings(tmp_path))
    assert data.class_names == ("cat", "dog", "elk")
    assert "1 of 3 classes have no training image" in caplog.text
    assert "[elk]" in caplog.text


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    path = integers(tmp_path, [1, 1, 1], [1])
    with pytest.raises(ValueError, match=r"^label_column: all 3 training images .* one class, 1:"):
        load_data(settings(path))
    load_test(settings(path))  # but something to measure
    write_folder(tmp_path / "animals", "train", {"cat": 2, "dog": 2})
    write_folder(tmp_path / "animals", "test", {"dog": 2})
    both = load_data(settings(tmp_path / "animals"))
    assert numbers(both.test) == [0, 1]
    with pytest.raises(ValueError, match=r"^label_column: .* one class, (cat|dog)"):
        load_data(settings(tmp_path / "animals", train_size=1))
