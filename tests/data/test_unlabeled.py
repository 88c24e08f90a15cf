"""Unlabelled images: where they come from, how batches mix them, and what is refused."""

import io
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from robust_accel.data import (
    NO_LABEL,
    DataSettings,
    FileImages,
    MemoryImages,
    TrainingBatches,
    load_data,
    load_test,
    load_to_label,
)

CPU = torch.device("cpu")
DIGITS = {"path": "sklearn:digits", "train_size": 200}


def picture(number: int, size: tuple[int, int] = (6, 5)) -> Image.Image:
    """A picture whose first pixel tells its number."""
    pixels = np.full((*size[::-1], 3), 7, dtype=np.uint8)
    pixels[0, 0] = number
    return Image.fromarray(pixels)


def write(path: Path, images: list[Image.Image], **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_dict({"img": images} | columns)
    rows.cast_column("img", datasets.Image()).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 training images, the numbers 0 to 11, of 3 classes; 3 test images."""
    folder = tmp_path_factory.mktemp("labeled")
    for split, number in (("train", 12), ("test", 3)):
        images = [picture(i) for i in range(number)]
        write(folder / f"{split}.parquet", images, label=[i % 3 for i in range(number)])
    return folder


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 images, the numbers 100 to 107, with a teacher's labels and their confidence."""
    folder = tmp_path_factory.mktemp("unlabeled")
    return write(
        folder / "images.parquet",
        [picture(100 + i) for i in range(8)],
        pseudo_label=[2 - i % 3 for i in range(8)],
        confidence=[i / 8 for i in range(8)],
        label=[0] * 8,  # the truth, which nobody may look at unless it is named
    )


def load(labeled: Path, path: Path | None, **options: Any) -> Any:
    own = {"path": None if path is None else str(path)} | options.pop("own", {})
    return load_data(DataSettings(path=str(labeled), unlabeled=own, **options))


def numbers(x: torch.Tensor) -> list[int]:
    return (x[:, 0, 0, 0] * 255).round().int().tolist()


# ---- where they come from ----------------------------------------------------------------------


def test_what_train_size_leaves_out_is_unlabeled() -> None:
    data = load_data(DataSettings(**DIGITS, unlabeled={}, validation_size=50))
    assert isinstance(data.unlabeled, MemoryImages)
    assert (len(data.train), len(data.validation), len(data.unlabeled)) == (150, 50, 1237)
    assert (data.unlabeled.labels == NO_LABEL).all()
    assert not data.all_labeled
    alone = load_data(DataSettings(path="sklearn:digits"))
    everyone = torch.cat([data.train.images, data.validation.images, data.unlabeled.images])
    assert everyone.double().mean() == pytest.approx(alone.train.images.double().mean().item())


def test_a_teachers_labels_are_used_and_true_ones_only_by_name(
    labeled: Path, unlabeled: Path
) -> None:
    data = load(labeled, unlabeled)
    assert data.unlabeled.labels.tolist() == [2 - i % 3 for i in range(8)]
    assert data.all_labeled
    assert load(labeled, unlabeled, own={"label_column": "label"}).unlabeled.labels.sum() == 0
    confident = load(labeled, unlabeled, own={"min_confidence": 0.5}).unlabeled
    assert confident.images[:, 0, 0, 0].tolist() == [104, 105, 106, 107]
    assert len(load(labeled, unlabeled, own={"size": 3}).unlabeled) == 3


def test_bad_labels_of_all_confident_images_leave_none(labeled: Path, tmp_path: Path) -> None:
    images = [picture(i) for i in range(4)]
    confidence = [0.1, 0.1, 0.9, 0.9]
    file = write(tmp_path / "a.parquet", images, pseudo_label=[0, 1, 7, 7], confidence=confidence)
    own = {"path": str(file), "min_confidence": 0.5}
    with pytest.raises(ValueError, match=r"^unlabeled\.path: no image of split train of .* left: "):
        load_data(DataSettings(path=str(labeled), unlabeled=own, on_bad="skip"))


def test_null_pools_both_sets(labeled: Path, unlabeled: Path) -> None:
    for options in ({}, {"in_memory": False, "image_size": 5, "num_workers": 0}):
        data = load(labeled, unlabeled, own={"fraction": None}, **options)
        assert data.unlabeled is None
        assert len(data.train) == 20
        assert data.train.labels[12:].tolist() == [2 - i % 3 for i in range(8)]
        ((x, _),) = data.train.batches([torch.arange(20)], CPU)
        assert x.shape[0] == 20


def test_images_from_files_are_mixed_too(labeled: Path, unlabeled: Path) -> None:
    data = load(labeled, unlabeled, in_memory=False, image_size=5, num_workers=1)
    assert isinstance(data.unlabeled, FileImages)
    ((x, labels), *_) = batches(data, 4).epoch(0, 0, CPU)
    assert x.shape == (4, 3, 5, 5)
    assert len(labels) == 4


def test_classes_are_chosen_and_numbered_anew(labeled: Path) -> None:
    settings = DataSettings(path=str(labeled), classes=(2, 0))
    data = load_data(settings)
    assert data.num_classes == 2
    found = dict(zip(numbers(data.train.images / 255), data.train.labels.tolist(), strict=True))
    assert found == {0: 1, 2: 0, 3: 1, 5: 0, 6: 1, 8: 0, 9: 1, 11: 0}
    assert load_test(settings).images.labels.tolist() == [1, 0]
    rows, images = load_to_label(DataSettings(path=str(labeled), classes=(2, 0), train_size=3))
    rest = load(labeled, None, classes=(2, 0), train_size=3).unlabeled
    assert torch.equal(images.images, rest.images)
    assert [np.asarray(row["img"])[0, 0, 0] for row in rows] == numbers(rest.images / 255)


# ---- batches -----------------------------------------------------------------------------------


def batches(data: Any, batch_size: int, rank: int = 0, world: int = 1, micro: int = 1, **options):
    return TrainingBatches(
        data, fraction=options.get("fraction", 0.5), batch_size=batch_size, num_micro=micro,
        rank=rank, world_size=world, seed=0, sharding="global",
    )  # fmt: skip


def test_each_batch_holds_the_share_and_each_set_its_own_epochs(
    labeled: Path, unlabeled: Path
) -> None:
    data = load(labeled, unlabeled)
    dealt = batches(data, 6)  # 3 labelled of 12, 3 unlabelled of 8
    assert dealt.steps_per_epoch == 4
    seen_labeled, seen_unlabeled = [], []
    for epoch in range(3):
        own = []
        for x, _ in dealt.epoch(epoch, 0, CPU):
            assert [n >= 100 for n in numbers(x)] == [False] * 3 + [True] * 3
            own += numbers(x[:3])
            seen_unlabeled += numbers(x[3:])
        assert sorted(own) == list(range(12))  # once an epoch each
        seen_labeled.append(own)
    assert seen_labeled[0] != seen_labeled[1]
    # 2 steps make an epoch of theirs, which cuts off 2 of 8; no image comes twice within one
    for start in range(0, 36, 6):
        assert len(set(seen_unlabeled[start : start + 6])) == 6
    assert set(seen_unlabeled) == set(range(100, 108))


def test_a_step_is_the_same_after_an_interruption_and_on_any_number_of_processes(
    labeled: Path, unlabeled: Path
) -> None:
    data = load(labeled, unlabeled, augment="crop_flip")
    whole = list(batches(data, 4).epoch(1, 0, CPU))
    late = list(batches(data, 4).epoch(1, 3, CPU))
    for (x, labels), (x_late, labels_late) in zip(whole[3:], late, strict=True):
        assert torch.equal(x, x_late)
        assert torch.equal(labels, labels_late)
    ranks = [list(batches(data, 4, rank, 2).epoch(1, 0, CPU)) for rank in range(2)]
    for (x, _), *parts in zip(whole, *ranks, strict=True):
        together = torch.cat([part[0] for part in parts])
        assert sorted(x.flatten(1).sum(1).tolist()) == sorted(together.flatten(1).sum(1).tolist())


@pytest.mark.parametrize(
    ("batch_size", "options"), [(6, {"world": 2}), (4, {"micro": 4}), (2, {"fraction": 0.1})]
)
def test_shares_that_cannot_be_dealt_are_refused(
    labeled: Path, unlabeled: Path, batch_size: int, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"batch_size: .*unlabelled images a step"):
        batches(load(labeled, unlabeled), batch_size, **options)


# ---- Carmon's file -----------------------------------------------------------------------------


def arrays(number: int = 5) -> dict[str, Any]:
    pixels = np.stack([np.asarray(picture(50 + i)) for i in range(number)])
    return {"data": pixels, "extrapolated_targets": np.arange(number) % 3}


def dump(folder: Path, content: Any, protocol: int = 4) -> Path:
    path = folder / "images.pickle"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_a_pickle_are_read(labeled: Path, tmp_path: Path, protocol: int) -> None:
    data = load(labeled, dump(tmp_path, arrays(), protocol))
    assert data.unlabeled.images[:, 0, 0, 0].tolist() == [50, 51, 52, 53, 54]
    assert data.unlabeled.labels.tolist() == [0, 1, 2, 0, 1]


def test_rows_of_a_pickle_without_a_class_are_left_out(labeled: Path, tmp_path: Path) -> None:
    targets = np.array([0, 1, 7, -2, -1], dtype=">i4")
    path = dump(tmp_path, arrays() | {"extrapolated_targets": targets})
    data = load(labeled, path, on_bad="skip")
    assert data.unlabeled.images[:, 0, 0, 0].tolist() == [50, 51, 54]
    assert data.unlabeled.labels.tolist() == [0, 1, NO_LABEL]
    assert data.left_out["unlabeled"].images == 2


def test_a_pickle_of_python_2_is_read(labeled: Path, tmp_path: Path) -> None:
    """Its module names are numpy's old ones, and its strings have no encoding."""
    text = pickle.dumps(arrays(), protocol=2).replace(b"numpy._core.", b"numpy.core.")
    path = tmp_path / "images.pickle"
    path.write_bytes(text)
    assert len(load(labeled, path).unlabeled) == 5


class Malicious:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


class Hidden:
    def __reduce__(self) -> Any:
        return (getattr, (np.ndarray, "tofile"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (arrays() | {"more": Malicious()}, "builtins.print"),
        (arrays() | {"data": np.array([Malicious()], dtype=object)}, "holds objects"),
        (arrays() | {"more": Hidden()}, "builtins.getattr"),
        (arrays() | {"more": io.BytesIO(b"")}, "_io.BytesIO"),
        (arrays() | {"more": np.array([None])}, "holds objects"),
        ([1, 2], "must hold a dictionary"),
        ({"images": np.zeros(3)}, "must hold 'data', uint8"),
        (arrays() | {"data": np.zeros((5, 5, 6, 3))}, "must hold 'data', uint8"),
        (arrays() | {"extrapolated_targets": np.zeros(4, int)}, "one integer an image"),
        (arrays() | {"extrapolated_targets": np.full(5, 3)}, "row 0 of .* has the label 3"),
        (
            arrays() | {"extrapolated_targets": np.full(5, 2**64 - 1, np.uint64)},
            f"label {2**64 - 1}",
        ),
    ],
)
def test_a_pickle_with_anything_else_is_refused_and_nothing_is_executed(
    labeled: Path, tmp_path: Path, content: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = dump(tmp_path, content)
    with pytest.raises(ValueError, match=f"unlabeled.*{message}"):
        load(labeled, path)
    assert "executed" not in capsys.readouterr().out


def test_a_broken_pickle_is_refused(labeled: Path, tmp_path: Path) -> None:
    path = dump(tmp_path, arrays())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"unlabeled.path: .*is refused"):
        load(labeled, path)
    with pytest.raises(ValueError, match=r"unlabeled.path: .*No such file"):
        load(labeled, tmp_path / "none.pickle")


# ---- what is refused ---------------------------------------------------------------------------


def test_images_that_do_not_go_with_the_labeled_ones_are_refused(
    labeled: Path, unlabeled: Path, tmp_path: Path
) -> None:
    large = write(tmp_path / "large.parquet", [picture(0, (8, 8))] * 3)
    grey = write(tmp_path / "grey.parquet", [picture(0).convert("L")] * 3)
    empty = write(tmp_path / "empty.parquet", [])
    cases = [
        (large, {}, "unlabeled.path: the unlabelled images are 3x8x8, the labelled ones 3x5x6"),
        (grey, {}, "unlabeled.path: the unlabelled images are 1x5x6, the labelled ones 3x5x6"),
        (empty, {}, "unlabeled.path: .*holds no image|unlabeled.path: .*cannot be loaded"),
        (unlabeled, {"min_confidence": 0.99}, "unlabeled.min_confidence: no image"),
        (large, {"min_confidence": 0.5}, "unlabeled.min_confidence: .*no column 'confidence'"),
        (unlabeled, {"size": 9}, "unlabeled.size: 9 exceeds the 8 images"),
        (unlabeled, {"label_column": "confidence"}, "label_column: .*no integers"),
        (unlabeled, {"split": "test"}, "unlabeled.split: .*no split 'test'"),
        (tmp_path / "none", {}, "unlabeled.path: .*cannot be loaded"),
    ]
    for path, own, message in cases:
        with pytest.raises(ValueError, match=message):
            load(labeled, path, own=own)
    with pytest.raises(ValueError, match=r"unlabeled.path: .*leaves no image out"):
        load(labeled, None, train_size=12)
    pickled = tmp_path / "own.pickle"
    pickled.write_bytes(b"")
    for own in (
        {"min_confidence": 0.5},
        {"label_column": "label"},
        {"image_column": "image"},
        {"split": "test"},
        {"config": "a"},
    ):
        ((key, value),) = own.items()
        for path, where in ((None, "what data.train_size leaves out"), (pickled, "a pickle as")):
            with pytest.raises(ValueError, match=f"^unlabeled.{key}: {value!r} is not for {where}"):
                load(labeled, path, own=own, train_size=6)
    with pytest.raises(ValueError, match=r"classes: .*has the classes 0 to 2"):
        load(labeled, unlabeled, classes=(0, 3))


@pytest.mark.parametrize(
    "settings",
    [
        {"unlabeled": {"path": "x", "fraction": 0}},
        {"unlabeled": {"path": "x", "fraction": 1}},
        {"unlabeled": {"path": "x", "min_confidence": 2}},
        {"unlabeled": {}},
        {"classes": [1]},
        {"classes": [1, 1]},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        DataSettings(path="x", **settings)


def test_the_images_held_out_are_in_no_source(
    labeled: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = r"^unlabeled.split: train of .* has the images that data.validation_size holds out"
    with pytest.raises(ValueError, match=said):
        load(labeled, labeled, train_size=6, validation_size=2)
    own = {"split": "test", "fraction": 0.5}
    load(labeled, labeled, validation_size=2, own=own)
    assert "are the test images" in caplog.text
    caplog.clear()
    load(labeled, labeled, validation_size=0)
    load(labeled, None, train_size=6, validation_size=2)
    assert not caplog.records
    with pytest.raises(ValueError, match="leaves out are one source"):
        DataSettings(path="x", train_size=6, unlabeled=({"fraction": 0.2}, {"fraction": 0.3}))


def test_a_source_of_fewer_images_than_a_step_has_is_named(labeled: Path, unlabeled: Path) -> None:
    data = load(labeled, unlabeled, own={"size": 3, "fraction": 0.5})
    about: Any = {"num_micro": 1, "rank": 0, "world_size": 1, "seed": 0, "sharding": "global"}
    said = "batch_size: 8 x data.unlabeled.fraction 0.5 makes 4 images a step, and there are 3"
    with pytest.raises(ValueError, match=said):
        TrainingBatches(data, batch_size=8, fraction=0.5, **about)
