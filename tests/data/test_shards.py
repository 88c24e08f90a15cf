"""WebDataset's shards: which they are, their index, their images, and what is refused."""

import http.server
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_folders import truncate
from shard_files import digit, label, write_shard

from robust_accel.data import (
    Data,
    DataSettings,
    FileImages,
    TrainingBatches,
    identity_of,
    load_data,
    load_test,
)
from robust_accel.data import shards as shards_module
from robust_accel.data.loading import load_to_label
from robust_accel.data.shards import changed, split_shards

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 8 digits to train on, and one to test."""
    for i in range(3):
        write_shard(tmp_path / "data" / f"train-{i:03}.tar", range(8 * i, 8 * i + 8))
    write_shard(tmp_path / "data" / "val-000.tar", range(100, 106))
    return tmp_path / "data"


def load(path: object, **options: Any) -> Data:
    return load_data(DataSettings(path=str(path), **{"test_split": "validation"} | options))


def only(path: object, **options: Any) -> Any:
    """The training split as it is: to train on, it is shuffled."""
    return load_test(DataSettings(path=str(path), test_split="train", **options)).images


def is_of(images: Any, numbers: list[int]) -> bool:
    """Whether these are the digits of these numbers, with their labels."""
    wanted = np.stack([np.asarray(digit(number)) for number in numbers])
    ((x, labels),) = images.batches([torch.arange(len(numbers))], CPU)
    pixels = (255 * x[:, 0]).round().byte().numpy()
    return np.array_equal(pixels, wanted) and labels.tolist() == list(map(label, numbers))


# ---- which shards ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cls", "json"])
@pytest.mark.parametrize(
    "path", ["", "{train,val}-*.tar", "*-*.tar", "{train-000,train-001,v*}.tar"]
)
def test_shards_are_found_by_folder_and_pattern(tmp_path: Path, kind: str, path: str) -> None:
    folder = tmp_path / "data"
    for name, numbers in (("train-000", range(8)), ("train-001", range(8, 20))):
        write_shard(folder / f"{name}.tar", numbers, kind=kind)
    write_shard(folder / "val-000.tar", range(100, 106), kind=kind)
    assert is_of(only(folder / path), [*range(20)])
    assert is_of(load(folder / path).test, [*range(100, 106)])


def test_patterns_are_written_out_as_a_shell_does(tmp_path: Path) -> None:
    for name in ("a-08", "a-09", "a-10", "b-08", "b-09", "b-10"):
        (tmp_path / f"{name}.tar").touch()
    (found,) = split_shards(f"{tmp_path}/{{a,b}}-{{08..10}}.tar").values()
    names = [f"{tmp_path}/{x}-{n}.tar" for x in "ab" for n in ("08", "09", "10")]
    assert found == names
    assert split_shards(f"{tmp_path}/*-0?.tar") == {"train": [n for n in names if "-0" in n]}
    odd = tmp_path / "x{1}.tar"
    odd.touch()
    assert split_shards(str(odd)) == {"train": [str(odd)]}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet1k-train-0000.tar", "train"),
        ("imagenet1k_validation_00.tar", "validation"),
        ("val/00.tar", "validation"),
        ("testing-1.tar", "test"),
        ("trainer/latest.tar", "train"),
        ("00.tar", "train"),
    ],
)
def test_the_split_is_a_word_of_the_name(tmp_path: Path, name: str, split: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert list(split_shards(str(tmp_path / name))) == [split]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("train-{000..004}.tar", r"there is no shard .*train-003\.tar \(and 1 more of 5\)"),
        ("train-9*.tar", "there is no file like"),
        ("train-{000,000}.tar", "names 1 shards twice"),
        ("train-{000..9999999}.tar", "names more than 1,048,576 shards"),
        ("train-{000.tar", "braces in braces, or such that do not close"),
        ("train-{0,{1,2}}.tar", "braces in braces, or such that do not close"),
        ("https://x.invalid/train-*.tar", "cannot be listed: write the numbers"),
        ("file://train-{000..001}.tar", "is not read here"),
    ],
)
def test_patterns_that_name_no_shards_are_refused(folder: Path, pattern: str, said: str) -> None:
    path = pattern if "://" in pattern else folder / pattern
    with pytest.raises(ValueError, match=rf"^path: .*{said}"):
        load(path)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The folder's address, and what was asked for there."""
    asked: list[str] = []
    handler = partial(type("Handler", (_Quiet,), {"asked": asked}), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()
        thread.join()


def test_shards_elsewhere_are_brought_once(folder: Path, server: tuple[str, list[str]]) -> None:
    address, asked = server
    path = f"{address}/{{train-000,train-001,train-002,val-000}}.tar"
    assert is_of(only(path), [*range(24)])
    assert load(path).identity() == load(folder).identity()
    first = list(asked)
    load(path)
    assert len([name for name in first if name.endswith("train-001.tar")]) == 1
    assert [name for name in asked[len(first) :] if name.endswith("train-001.tar")] == []
    with pytest.raises(ValueError, match=r"^path: .*train-007\.tar"):
        load(f"{address}/train-{{000,007}}.tar")


# ---- their index -------------------------------------------------------------------------------


def test_the_index_is_made_once_and_anew_for_what_has_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    samples = shards_module.samples
    monkeypatch.setattr(
        shards_module, "samples", lambda path, **how: read.append(path) or samples(path, **how)
    )
    load(folder)
    assert len(read) == 4
    load(folder / "train-*.tar", test_split="train")
    assert len(read) == 4
    write_shard(folder / "train-001.tar", range(50, 58))
    os.utime(folder / "train-001.tar", ns=(1, 1))
    images = only(folder)
    assert [Path(path).name for path in read[4:]] == ["train-001.tar"]
    assert is_of(images, [*range(8), *range(50, 58), *range(16, 24)])
    kept = [path.parent.name for path in Path(folder.parent, "cache").rglob("*.arrow")]
    assert len(kept) == len(set(kept)) == 4  # no index of what the shard was


def test_a_copy_elsewhere_is_the_same_data_and_labels_and_names_count(folder: Path) -> None:
    known = load(folder).identity()
    assert [*known["train"]["shards"]] == ["train-000.tar", "train-001.tar", "train-002.tar"]
    copy = folder.rename(folder.with_name("copy"))
    for path in copy.iterdir():
        os.utime(path, ns=(5, 5))
    assert load(copy).identity() == known
    assert load(copy, in_memory=False, image_size=8, num_workers=0).identity() != known
    write_shard(copy / "train-001.tar", range(8, 16), cls9=str((label(9) + 1) % 10).encode())
    now = load(copy).identity()
    assert now["train"]["digest"] != known["train"]["digest"]
    of = known["train"]["shards"], now["train"]["shards"]
    assert changed(*of) == "shard train-001.tar has other images or labels; "
    assert changed(of[0], {}) == "shard train-000.tar is missing (and 2 more); "
    assert changed({}, of[0]) == "shard train-000.tar is new (and 2 more); "
    assert changed(of[0], of[0]) == ""


def test_no_image_is_read_before_it_is_asked_for(folder: Path, monkeypatch: Any) -> None:
    """Of an ImageNet, a third of a minute's reading at the start would be hours."""
    read: list[Any] = []
    place = shards_module.read_place
    monkeypatch.setattr(
        "robust_accel.data.decoding.read_place", lambda found: read.append(found) or place(found)
    )
    images = only(folder, in_memory=False, image_size=8, num_workers=0)
    assert read == []
    assert isinstance(images, FileImages)
    next(images.batches([torch.tensor([3, 17])], CPU))
    assert [found["shard"].rpartition("/")[2] for found in read] == [
        "train-000.tar",
        "train-002.tar",
    ]


# ---- their images ------------------------------------------------------------------------------


def order(data: Data, world: int, epoch: int, first: int = 0) -> list[list[int]]:
    """The training images of each step, whichever process has them."""
    of_rank = []
    for rank in range(world):
        about: Any = {"fraction": None, "num_micro": 1, "seed": 0, "sharding": "global"}
        batches = TrainingBatches(data, batch_size=6, rank=rank, world_size=world, **about)
        of_rank.append([x[:, 0].flatten(1) for x, _ in batches.epoch(epoch, first, CPU)])
    steps = [torch.cat(parts) for parts in zip(*of_rank, strict=True)]
    return [[hash(tuple(row)) for row in step.tolist()] for step in steps]


def test_each_image_comes_once_an_epoch_in_one_order_on_any_number_of_processes(
    folder: Path,
) -> None:
    data = load(folder, in_memory=False, image_size=8, num_workers=0)
    one = order(data, 1, 0)
    assert order(data, 2, 0) == one
    assert order(data, 3, 0) == one
    assert len({image for step in one for image in step}) == 24
    assert order(data, 1, 1) != one
    assert order(data, 2, 0, first=2) == one[2:]
    assert order(load(folder, in_memory=False, image_size=8, num_workers=1), 2, 0) == one


@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_images_and_labels_are_named_with_their_shard_or_left_out(
    tmp_path: Path, in_memory: bool
) -> None:
    options: dict[str, Any] = {} if in_memory else {"image_size": 8, "num_workers": 0}
    options["in_memory"] = in_memory
    path = tmp_path / "train" / "0.tar"
    write_shard(path, png2=b"no image", cls6=None, png7=None)
    with pytest.raises(
        ValueError,
        match=r"^label_column: 'cls': row 6 of .* \(0\.tar/0006\.png\) has no label; data\.",
    ):
        only(path, **options)
    kept = only(path, on_bad="skip", **options)
    assert kept.labels.tolist() == [label(number) for number in (0, 1, 3, 4, 5)]
    assert not in_memory or is_of(kept, [0, 1, 3, 4, 5])
    for other, said in (
        ({"png2": b"no image"}, r"\(0\.tar/0002\.png\) has no format"),
        ({"png7": None}, r"\(0\.tar/0007\) is missing"),
    ):
        write_shard(path, **other)
        with pytest.raises(ValueError, match=rf"path: image [27] of .*{said}"):
            is_of(only(path, **options), [*range(8)])
    write_shard(path, cls3=b"1000000")
    with pytest.raises(ValueError, match=r"\(0\.tar/0003\.png\) has the label 1000000, allowed"):
        only(path, **options)


def test_broken_shards_are_named(tmp_path: Path) -> None:
    tar = tmp_path / "train.tar"
    starts = write_shard(tar)
    whole = tar.read_bytes()
    for end in (starts[4], starts[4] + 100, starts[4] + 512, starts[4] + 600, starts[-1] + 1024):
        tar.write_bytes(whole[:end])
        with pytest.raises(
            ValueError, match=r"^path: .*train\.tar is (no whole tar file|truncated)"
        ):
            only(tar)
    tar.write_bytes(whole[: starts[4]] + b"\xff" * 512 + whole[starts[4] + 512 :])
    with pytest.raises(ValueError, match=rf"^path: .*train\.tar is broken at byte {starts[4]}"):
        only(tar)
    for content in (b"", b"no archive", b"\x1f\x8b" + bytes(50)):
        tar.write_bytes(content)
        with pytest.raises(ValueError, match=r"^path: .*train\.tar is (no whole|truncated|broken)"):
            only(tar)
    write_shard(tar, mode="w:gz")
    with pytest.raises(ValueError, match=r"train\.tar is no whole tar file, or a compressed one"):
        only(tar)


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [
        ("cls", {"cls5": b"cat"}, r"0005\.cls holds b'cat', no integer"),
        ("cls", {"cls5": b""}, r"0005\.cls holds b'', no integer"),
        ("cls", {"cls5": b"9" * 30}, r"0005\.cls holds an integer of more than 64 bits"),
        ("json", {"json5": b"{"}, r"0005\.json holds no JSON object"),
        ("json", {"json5": b"[" * 10**5}, r"0005\.json holds no JSON object"),
        ("json", {"json5": b"[1]"}, r"0005\.json holds no JSON object"),
        ("json", {"json5": b'{"label": 1.5}'}, r"\(train\.tar/0005\.png\) has no label"),
    ],
)
def test_labels_that_are_none_are_named(
    tmp_path: Path, kind: str, changed: dict[str, bytes], said: str
) -> None:
    tar = tmp_path / "train.tar"
    write_shard(tar, kind=kind, **changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"train\.tar.*{said}"):
        only(tar)
    kept = only(tar, on_bad="skip")
    assert is_of(kept, [0, 1, 2, 3, 4, 6, 7])
    with pytest.raises(ValueError, match=r"\(train\.tar/0005\.png\) has no label; data\.on_bad"):
        only(tar)  # by the index that has been made


def test_shards_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", range(8))
    write_shard(tmp_path / "train-1.tar", range(8, 16), kind="json")
    with pytest.raises(ValueError, match=r"train-1\.tar has \['image', 'label'\], .*train-0\.tar"):
        only(tmp_path / "train-*.tar")
    with tarfile.open(tmp_path / "train-1.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"^path: .*train-1\.tar holds no sample"):
        only(tmp_path / "train-*.tar")
    with tarfile.open(tmp_path / "twice.tar", "w") as archive:
        for name in ("left", "right"):
            digit(0).save(tmp_path / "0.png")
            archive.add(tmp_path / "0.png", f"a.{name}.png")
    with pytest.raises(ValueError, match=r"a\.left\.png and a\.right\.png are images of one samp"):
        only(tmp_path / "twice.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(ValueError, match=r"pipe\.tar cannot be read: is no file, but a folder, pi"):
        only(tmp_path / "pipe.tar")


@pytest.mark.parametrize("how", ["changed", "gone", "short"])
def test_a_shard_that_changes_under_a_run_is_named(folder: Path, how: str) -> None:
    """An image of another shard, or half of one, is never taken for the indexed one."""
    images = only(folder, in_memory=False, image_size=8, num_workers=0)
    path = folder / "train-001.tar"
    if how == "changed":
        write_shard(path, range(30, 38))
        os.utime(path, ns=(1, 1))
    elif how == "short":
        truncate(path)
    else:
        path.unlink()
    next(images.batches([torch.tensor([0, 1])], CPU))
    said = "No such file" if how == "gone" else "has changed since the start"
    with pytest.raises(
        ValueError, match=rf"^data\.path: image 9 .*\(train-001\.tar/0009\.png\).*{said}"
    ):
        next(images.batches([torch.tensor([0, 9])], CPU))


def test_what_is_listed_by_name_is_found_in_its_shard(folder: Path) -> None:
    (folder.parent / "ids.txt").write_text("0103.png\nval-000.tar/0100.png\n")
    settings = DataSettings(path=str(folder), test_split="validation")
    found = load_test(settings, ids=str(folder.parent / "ids.txt"))
    assert is_of(found.images, [103, 100])


def test_unlabelled_images_lie_in_shards_too(folder: Path) -> None:
    write_shard(folder.parent / "more" / "0.tar", range(200, 210))
    own = {"path": f"{folder.parent}/more/*.tar"}
    data = load(folder, unlabeled=own)
    assert data.unlabeled is not None and not data.all_labeled
    labelled = load(folder, unlabeled=own | {"label_column": "cls"}).unlabeled
    assert is_of(labelled, [*range(200, 210)])


def test_pseudo_labels_are_not_made_of_shards(folder: Path) -> None:
    with pytest.raises(ValueError, match="images in shards are not written as parquet"):
        load_to_label(DataSettings(path=str(folder), train_size=10))
    assert re.search("train", "".join(identity_of(train=load(folder).train)))
