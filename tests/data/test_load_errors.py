"""What cannot be loaded is said with its file and cause; copies of changed files are not used."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numbered_images import image, numbers, settings, write_parquet
from picture_folders import truncate, write_folder

from robust_accel.data import load_test
from robust_accel.data.sources import load_splits


def load(path: Path, **options: Any) -> Any:
    return load_test(settings(path, test_split="train", **options)).images


@pytest.mark.parametrize("address", ["zip://x::{0}", "file://{0}", "dir://x::file://{0}"])
def test_another_name_of_a_local_pipe_is_not_waited_for(tmp_path: Path, address: str) -> None:
    os.mkfifo(tmp_path / "f.tar")
    path = address.format(tmp_path / "f.tar")
    message = rf"path: '{re.escape(path)}' is not read here: allowed are local paths, and hf://"
    with pytest.raises(ValueError, match=rf"^{message}"):
        load_splits(path, None)


@pytest.mark.parametrize("path", ["sklearn:digits", "a/b.parquet", "a/{0..3}.tar", "b.arrow"])
def test_a_configuration_of_what_has_none_is_refused(path: str) -> None:
    said = f"^config: 'clean' is one of a data set's, and {re.escape(path)}"
    with pytest.raises(ValueError, match=said):
        load_splits(path, "clean")


def test_braces_may_name_more_than_one_name_has_room_for(tmp_path: Path) -> None:
    numbers = ",".join(f"{number:04}" for number in range(0, 300, 5))
    path = f"{tmp_path}/train-{{{numbers}}}.tar"
    assert settings(Path(path)).path == path
    with pytest.raises(ValueError, match=r"no shard .*train-0000.tar \(and 59 more of 60"):
        load_splits(path, None)


# ---- errors of datasets ------------------------------------------------------------------------


def no_bytes(folder: Path) -> None:
    (folder / "train.parquet").write_bytes(b"")


def half(folder: Path) -> None:
    truncate(write_parquet(folder, "train", [image(0), image(1)]))


def half_a_shard(folder: Path) -> None:
    write_parquet(folder, "train-00000-of-00002", [image(0)])
    truncate(write_parquet(folder, "train-00001-of-00002", [image(0)]))


def other_columns(folder: Path) -> None:
    write_parquet(folder, "train-00000-of-00002", [image(0)])
    pq.write_table(pa.table({"foo": [1.5]}), folder / "train-00001-of-00002.parquet")


def broken_pages(folder: Path) -> None:
    file = write_parquet(folder, "train", [image(i) for i in range(9)])
    content = file.read_bytes()
    file.write_bytes(content[:4] + b"\xff" * 40 + content[44:])


def half_an_arrow(folder: Path) -> None:
    (folder / "train.arrow").write_bytes(b"ARROW1\0\0" + bytes(100))


def broken_json(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"a": 1}\n' * 50 + '{"a":')


def other_metadata(folder: Path) -> None:
    write_folder(folder, "train", {"cat": 1})
    (folder / "train" / "metadata.csv").write_text("x,label\ncat/0.png,1\n")


def only_a_table(folder: Path) -> None:
    (folder / "a.csv").write_text("x,y\n1,2\n")


def folders_in_folders(folder: Path) -> None:
    files = write_folder(folder, "train", {"cat": 2, "dog": 2})
    (folder / "train" / "cat" / "more").mkdir()
    files[0].rename(folder / "train" / "cat" / "more" / "0.png")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (no_bytes, r"train\.parquet.*ArrowInvalid: .* is 0 bytes"),
        (half, r"train\.parquet.*ArrowInvalid: Parquet magic bytes not found"),
        (half_a_shard, r"train-00001-of-00002\.parquet.*ArrowInvalid: .*magic bytes"),
        (other_columns, r"train-00001-of-00002\.parquet' with error .*CastError.* don't match"),
        (broken_pages, r"train\.parquet: OSError: .*(page header|thrift)"),
        (half_an_arrow, r"train\.arrow: ArrowInvalid: Not an Arrow file"),
        (broken_json, r"train\.jsonl' with error .*JSON parse error"),
        (other_metadata, r"cannot be loaded: ValueError: .*file_name"),
        (lambda folder: None, r"cannot be loaded: EmptyDatasetError: .*doesn't contain any data"),
        (only_a_table, r"image_column: .* none holds images .* x \(int64\), y \(int64\)"),
        (folders_in_folders, r"label_column: .*folders are classes if all images lie in SPLIT/CLA"),
    ],
)
def test_file_and_cause_are_said_in_one_line(
    tmp_path: Path, make: Callable[[Path], None], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    for on_bad in ("refuse", "skip"):  # which is about images: a broken file may hold any number
        with pytest.raises(ValueError, match=said) as caught:
            load(folder, on_bad=on_bad)
        assert "\n" not in str(caught.value) and "while generating" not in str(caught.value)
    assert "Failed to" not in capfd.readouterr().err  # said once


@pytest.mark.parametrize("name", ["a.npz", "a.png", "a.zip", "a"])
def test_files_of_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"^path: .*a.* is no file that is read here: allowed are"):
        load(tmp_path / name)


def test_what_save_to_disk_wrote_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"label": [0]}).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"^path: .* was written by save_to_disk"):
        load(tmp_path)


def test_messages_of_datasets_are_heard_again_afterwards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(tmp_path)
    assert not any(handler.filters for handler in logging.getLogger("datasets").handlers)


# ---- copies that datasets keeps ----------------------------------------------------------------


def at(file: Path, seconds: float) -> Path:
    os.utime(file, (seconds, seconds))
    return file


@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_changed_file_is_read_anew_though_it_has_the_same_name_and_time(
    tmp_path: Path, whole_folder: bool
) -> None:
    """As after `rsync -t`, `cp -p`, `tar x` and in images of containers."""
    pictures: Any = [image(i) for i in range(4)]
    for labels in ([0, 1, 2, 0], [2, 2, 1, 0]):
        path = at(write_parquet(tmp_path, "train", pictures, labels), 1e9)
        for _ in range(2):
            assert load(tmp_path if whole_folder else path).labels.tolist() == labels


def test_a_changed_image_is_read_anew(tmp_path: Path) -> None:
    files = [at(file, 1e9) for file in write_folder(tmp_path, "train", {"cat": 2, "dog": 2})]
    assert numbers(load(tmp_path)) == [0, 1, 2, 3]
    image(77).save(files[1])
    at(files[1], 1e9)
    assert numbers(load(tmp_path)) == [0, 77, 2, 3]


def test_a_copy_is_used_again_while_its_files_stay(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, "train", [image(0), image(1)])
    load(path)
    (copy,) = datasets.load_dataset("parquet", data_files=str(path), split="train").cache_files
    before = os.stat(copy["filename"]).st_ino
    load(path)
    assert os.stat(copy["filename"]).st_ino == before


@pytest.mark.parametrize(
    "spoil",
    [truncate, lambda file: file.write_bytes(b""), Path.unlink],
    ids=["half", "empty", "gone"],
)
def test_a_broken_copy_is_made_anew(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = write_parquet(tmp_path, "train", [image(0), image(1)])
    load(path)
    (copy,) = datasets.load_dataset("parquet", data_files=str(path), split="train").cache_files
    spoil(Path(copy["filename"]))
    assert numbers(load(path)) == [0, 1]
