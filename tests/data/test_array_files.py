"""``.npz`` files and folders of arrays: what is read, what is unpacked, and what is refused."""

import os
import re
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_arrays import arrays, pixels, write, write_folder, write_hollow

from robust_accel.data import DataSettings, MemoryImages
from robust_accel.data.array_files import array_names, stored_array
from robust_accel.data.classes import Classes
from robust_accel.data.unlabeled import load_unlabeled


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "robust_accel-arrays"


def load(path: Path, **own: Any) -> Any:
    """The images as they go with images of 3x5x6 of 3 classes."""
    options = {key: own.pop(key) for key in ("classes", "on_bad", "in_memory") if key in own}
    extra = {"image_size": 5} if options.get("in_memory") is False else {}
    settings = DataSettings(path="x", unlabeled={"path": str(path)} | own, **options, **extra)
    train = MemoryImages(torch.zeros(2, 3, 5, 6, dtype=torch.uint8), torch.tensor([0, 1]))
    classes = Classes(3, None, "x")
    return load_unlabeled(settings.extra[0], settings, train, train, classes, 0)[0]


def numbers(images: Any) -> list[int]:
    ((x, _),) = images.batches([torch.arange(len(images))], torch.device("cpu"))
    return (x[:, 0, 0, 0] * 255).round().int().tolist()


def copies(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.npy"))


# ---- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_pixels_and_labels_of_a_file_arrive_as_they_are(tmp_path: Path, compressed: bool) -> None:
    content = arrays(8, label=np.array([0, 1, 2, -1, 0, 1, 2, 0], dtype=">i2"))
    images = load(write(tmp_path, compressed=compressed, **content))
    indices = torch.tensor([5, 0, 3])
    ((x, labels),) = images.batches([indices], torch.device("cpu"))
    wanted = torch.from_numpy(content["image"])[indices].permute(0, 3, 1, 2)
    assert torch.equal((x * 255).round().byte(), wanted)
    assert x.is_contiguous()
    assert labels.tolist() == [1, 0, -1]
    assert images.shape == (3, 5, 6)


@pytest.mark.parametrize(
    ("content", "own"),
    [
        ({"data": pixels(4), "extrapolated_targets": np.arange(4) % 3}, {}),
        ({"images": pixels(4), "labels": (np.arange(4) % 3).astype(np.uint8)}, {}),
        (arrays(4, names=np.array(["cat"], dtype=object), other=np.zeros(3)), {}),
        (
            {"x": pixels(4), "y": (np.arange(4) % 3).astype(np.uint64), "label": np.zeros(4)},
            {"image_column": "x", "label_column": "y"},
        ),
    ],
)
def test_names_of_arrays_are_known_or_given(tmp_path: Path, content: Any, own: Any) -> None:
    images = load(write(tmp_path, **content), **own)
    assert numbers(images) == [100, 101, 102, 103]
    assert images.labels.tolist() == [0, 1, 2, 0]


def test_a_folder_of_arrays_is_read(tmp_path: Path) -> None:
    images = load(write_folder(tmp_path / "made", pixels(4), np.arange(4) % 3))
    assert (numbers(images), images.labels.tolist()) == ([100, 101, 102, 103], [0, 1, 2, 0])


def test_a_folder_of_arrays_of_other_names_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    np.save(folder / "x.npy", pixels(4))
    np.save(folder / "y.npy", np.arange(4) % 3)
    images = load(folder, image_column="x", label_column="y")
    assert (numbers(images), images.labels.tolist()) == ([100, 101, 102, 103], [0, 1, 2, 0])


def test_images_alone_have_no_labels(tmp_path: Path) -> None:
    for path in (write(tmp_path, image=pixels(4)), write_folder(tmp_path / "made", pixels(4))):
        assert load(path).labels.tolist() == [-1] * 4


def test_size_draws_images_once(tmp_path: Path) -> None:
    path = write(tmp_path, **arrays(50))
    images = load(path, size=20)
    found = numbers(images)
    assert len(set(found)) == len(found) == 20
    assert found != sorted(found)
    assert images.labels.tolist() == [(n - 100) % 3 for n in found]
    assert numbers(load(path, size=20)) == found
    assert load(path, size=20).digest() == images.digest() != load(path).digest()


def test_a_file_of_over_4_gib_is_read_where_it_lies(tmp_path: Path) -> None:
    shape = (500, 600, 3)
    number = 2**32 // (500 * 600 * 3) + 10
    path = write_hollow(tmp_path / "made.npz", pixels(2, shape), number)
    with zipfile.ZipFile(path) as archive:  # a kind of zip of its own
        assert archive.getinfo("image.npy").file_size > 2**32
    array = stored_array(str(path), "image").open()
    assert array.shape == (number, *shape)
    assert np.array_equal(array.rows(np.arange(2)), pixels(2, shape))
    assert not array.rows(np.array([number - 1])).any()
    labels = stored_array(str(path), "label").open().whole()
    assert np.array_equal(labels, np.arange(number) % 2)


# ---- what goes on while it is read -------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_that_is_cut_short_under_way_is_named(
    tmp_path: Path, cache: Path, compressed: bool
) -> None:
    path = write(tmp_path, compressed=compressed, **arrays(2000))
    images = load(path)
    batches = images.batches(torch.arange(2000).split(10), torch.device("cpu"))
    next(batches)
    (place,) = [copy for copy in copies(cache) if copy.stat().st_size > 50_000] or [path]
    os.truncate(place, 10_000)
    with pytest.raises(ValueError, match=rf"^path: {re.escape(str(place))} has been cut short"):
        list(batches)


# ---- what is compressed ------------------------------------------------------------------------


def test_a_compressed_file_is_unpacked_once_and_anew_when_it_changes(
    tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path, compressed=True, **arrays(8))
    load(path)
    first = copies(cache)
    times = [copy.stat().st_mtime_ns for copy in first]
    assert len(first) == 2
    load(path)
    assert [copy.stat().st_mtime_ns for copy in copies(cache)] == times
    write(tmp_path, compressed=True, **arrays(8, image=pixels(8)[::-1]))
    os.utime(path, ns=(1, 1))
    assert numbers(load(path)) == list(range(107, 99, -1))
    assert len(copies(cache)) == 2
    assert {*copies(cache)}.isdisjoint(first)
    copies(cache)[0].write_bytes(b"cut off")
    copies(cache)[1].write_bytes(b"cut off")
    assert numbers(load(path)) == list(range(107, 99, -1))


def test_many_at_once_unpack_a_file_once(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(write(tmp_path, compressed=True, **arrays(8)))
    found: list[int] = []

    def read() -> None:
        found.append(int(stored_array(path, "image").open().whole()[7, 0, 0, 0]))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [107] * 8
    assert caplog.text.count("unpacked once") == len(copies(cache)) == 1


def test_a_compressed_file_that_the_disk_has_no_room_for_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, compressed=True, **arrays(8))
    few = type("Usage", (), {"free": 10})
    monkeypatch.setattr("robust_accel.data.array_files.shutil.disk_usage", lambda _: few)
    with pytest.raises(ValueError, match=r"^unlabeled\.path: .* compressed, .* save the file by"):
        load(path)
    assert not copies(cache)


def test_what_does_not_match_its_checksum_leaves_no_copy(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, compressed=True, **arrays(50))
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("image.npy")
    content = bytearray(path.read_bytes())
    content[info.header_offset + info.compress_size // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^unlabeled\.path: .*made.npz is refused: "):
        load(path)
    assert not any("image" in str(copy) or copy.stat().st_size > 1000 for copy in copies(cache))


# ---- what is refused ---------------------------------------------------------------------------


class Malicious:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": pixels(4)}, r"path: .*npz must hold 'image' and 'label' or .*, found \[a\]"),
        ({}, r"path: .*must hold 'image' and 'label' or .*, found \[\]"),
        ({"image": pixels(4), "y": np.zeros(4)}, r"label_column: .*'image' and no labels 'label'"),
        (arrays(image=pixels(8) / 255), r"path: 'image' of .* must be uint8 .*found float64 \[8,"),
        (arrays(image=pixels(8)[0]), r"path: 'image' .* found uint8 \[5, 6, 3\]"),
        (arrays(image=pixels(8).transpose(0, 3, 1, 2).copy()), r"path: .*channels first\?"),
        (arrays(image=pixels(8, (5, 6, 4))), r"path: 'image' .* 1 or 3 channels, last"),
        (arrays(image=pixels(8, (6, 6, 3))), r"path: the unlabelled images are 3x6x6, the lab"),
        (arrays(image=np.asfortranarray(pixels(8))), r"path: .*'image' is in Fortran's order"),
        (arrays(0), r"path: 'image' of .* holds no image"),
        (
            arrays(label=np.zeros(7, int)),
            r"path: 'label' .* one integer an image, \[8\], found int",
        ),
        (arrays(label=np.zeros((8, 1), int)), r"path: 'label' .* found int64 \[8, 1\]"),
        (arrays(label=np.zeros(8)), r"path: 'label' .* found float64 \[8\]"),
        (arrays(label=np.arange(8)), r"path: 'label': row 3 of .* the label 3, allowed are 0 to 2"),
        (arrays(label=np.full(8, -2)), r"path: 'label': row 0 of .* the label -2"),
        (arrays(label=np.full(8, 2**64 - 1, np.uint64)), f"path: .* the label {2**64 - 1}"),
        (arrays(label=np.array([Malicious()] * 8)), r"path: .*'label' holds objects or text"),
        (arrays(image=np.array([Malicious()] * 8)), r"path: .*'image' holds objects or text"),
        (arrays(image=np.zeros(8, [("a", "u1")])), r"path: .*'image' holds objects or text"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_other_arrays_are_refused_by_file_and_key(
    tmp_path: Path, cache: Path, content: Any, message: str, compressed: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write(tmp_path, compressed=compressed, **content)
    with pytest.raises(ValueError, match=rf"^unlabeled\.{message}") as error:
        load(path)
    assert "executed" not in capsys.readouterr().out
    assert str(path) in str(error.value) or "labelled ones" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_zip_or_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, **arrays())
    whole = path.read_bytes()
    for content in (b"", b"PK\3\4", b"no zip", whole[:-1], whole[: len(whole) // 2], whole[100:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^unlabeled\.path: .*made\.npz is refused: "):
            load(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"^unlabeled\.path: .*cannot be read: No such file"):
        load(path)
    path.mkdir()
    with pytest.raises(ValueError, match=r"^unlabeled\.path: .*made\.npz must hold"):
        load(path)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(ValueError, match=r"^unlabeled\.path: .*pipe\.npz cannot be read: "):
        load(tmp_path / "pipe.npz")


def test_every_flipped_byte_of_a_files_headers_is_read_or_refused(tmp_path: Path) -> None:
    """Whatever a stranger's file says of itself: one error, or an array of its bytes."""
    path = write(tmp_path, image=pixels(1), label=np.zeros(1, int))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    read = refused = 0
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= int(rng.integers(1, 256))
        path.write_bytes(content)
        try:
            for name in array_names(str(path)):
                array = stored_array(str(path), name).open().whole()
                assert array.nbytes <= len(whole)
                array.sum()
        except ValueError as error:
            refused += str(error).startswith(f"path: {path} ")
        else:
            read += 1
    assert read + refused == len(whole)
    assert refused > 200


def test_a_member_that_says_it_is_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "made.npz"
    write_hollow(path, pixels(4), 1000)
    content = path.read_bytes()
    path.write_bytes(content[: 30 * 90] + content[900 * 90 :])
    with pytest.raises(ValueError, match=r"^unlabeled\.path: .*made\.npz is refused: "):
        load(path)
    folder = write_folder(tmp_path / "folder", pixels(50))
    whole = (folder / "images.npy").read_bytes()
    (folder / "images.npy").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"folder is refused: 'images' of shape .* wants 4628 "):
        load(folder)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"fraction": None}, "fraction: null pools images in memory, and those of"),
        ({"split": "test"}, "split: 'test' is not for arrays"),
        ({"config": "a"}, "config: 'a' is not for arrays"),
        ({"min_confidence": 0.5}, "min_confidence: 0.5 is not for arrays"),
        ({"image_column": "x"}, r"image_column: .* no array 'x'; arrays are \[image, label\]"),
        ({"label_column": "x"}, r"label_column: .* no array 'x'; arrays are \[image, label\]"),
        ({"size": 9}, "size: 9 exceeds the 8 images"),
        ({"classes": (0, 1)}, "path: 'label' of .* are numbers, but data.classes"),
        ({"in_memory": False}, "path: .* is read with data.in_memory: true only"),
    ],
)
def test_settings_that_are_not_for_such_files_are_refused(
    tmp_path: Path, own: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^unlabeled\.{message}"):
        load(write(tmp_path, **arrays()), **own)


def test_on_bad_skip_does_not_leave_rows_out_in_silence(tmp_path: Path) -> None:
    path = write(tmp_path, **arrays(label=np.arange(8)))
    with pytest.raises(ValueError, match=re.escape("on_bad: skip neither")):
        load(path, on_bad="skip")
