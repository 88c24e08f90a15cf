"""Images of a pickle stay in it, and are those that a tensor of them would be."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peaks import growth
from published_arrays import pixels

from robust_accel.data import DataSettings, MemoryImages
from robust_accel.data.array_files import FileArray
from robust_accel.data.array_images import images_of_pickle
from robust_accel.data.array_pickle import load_arrays
from robust_accel.data.batch_augmentation import BatchAugmentation
from robust_accel.data.classes import Classes
from robust_accel.data.file_pixels import FilePixels
from robust_accel.data.unlabeled import load_unlabeled

CPU = torch.device("cpu")
NUMBER = 900  # images of 90 bytes: more than what is read at once
LABELS = np.arange(NUMBER) % 3
STAY = range(3, pickle.HIGHEST_PROTOCOL + 1)  # protocols that write bytes as they are


def dump(folder: Path, content: Any, protocol: int = 3) -> Path:
    path = folder / "images.pickle"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def images(number: int = NUMBER) -> np.ndarray:
    found = pixels(156)
    return np.concatenate([found] * (number // 156 + 1))[:number]


def carmons(number: int = NUMBER, **other: Any) -> dict[str, Any]:
    return {"data": images(number), "extrapolated_targets": np.arange(number) % 3} | other


def load(path: Path, seed: int = 0, **options: Any) -> MemoryImages:
    own = {"path": str(path)} | {k: options.pop(k) for k in ("size", "fraction") if k in options}
    settings = DataSettings(path="x", unlabeled=own, **options)
    like = MemoryImages(torch.zeros(2, 3, 5, 6, dtype=torch.uint8), torch.tensor([0, 1]))
    classes = Classes(3, None, "x")
    found, _ = load_unlabeled(settings.extra[0], settings, like, like, classes, seed)
    assert isinstance(found, MemoryImages)
    return found


def in_memory(like: MemoryImages) -> MemoryImages:
    """The same images as a tensor."""
    whole = torch.from_numpy(images()).permute(0, 3, 1, 2).contiguous()
    return MemoryImages(whole, torch.from_numpy(LABELS), like.augmentation)


def batches(found: MemoryImages, indices: torch.Tensor, epoch: int | None) -> list[torch.Tensor]:
    return [part for batch in found.batches(indices.split(7), CPU, epoch) for part in batch]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_they_are_known_and_dealt_as_images_in_memory(tmp_path: Path, protocol: int) -> None:
    found = load(dump(tmp_path, carmons(), protocol), augment="crop_flip")
    assert isinstance(found.images, FilePixels) == (protocol in STAY)
    expected = in_memory(found)
    assert found.digest() == expected.digest()
    order = torch.randperm(NUMBER)
    for epoch in (None, 2):
        assert same(batches(found, order, epoch), batches(expected, order, epoch))
    some = order[:40]
    few, others = found.subset(some).subset(torch.arange(3, 30)), expected.subset(some[3:30])
    assert few.digest() == others.digest()
    assert same(batches(few, torch.arange(27), 1), batches(others, torch.arange(27), 1))


def test_pooled_with_labelled_ones_they_are_those_of_one_tensor(tmp_path: Path) -> None:
    found = load(dump(tmp_path, carmons()), fraction=None, augment="crop_flip")
    tensor = torch.randint(0, 256, (50, 3, 5, 6), dtype=torch.uint8)
    labelled = MemoryImages(tensor, torch.arange(50) % 3, BatchAugmentation("crop_flip", seed=4))
    pooled, expected = (labelled.pooled(other) for other in (found, in_memory(found)))
    assert isinstance(pooled.images, FilePixels) and len(pooled) == 50 + NUMBER
    assert pooled.digest() == expected.digest()
    order = torch.randperm(len(pooled))
    assert same(batches(pooled, order, 3), batches(expected, order, 3))
    parts = (one.subset(order[:99]).digest() for one in (pooled, expected))
    assert len({*parts}) == 1


def test_rows_that_are_left_out_and_drawn_are_the_same(tmp_path: Path) -> None:
    targets = np.where(np.arange(NUMBER) % 10 == 0, 7, LABELS)
    path = dump(tmp_path, carmons(extrapolated_targets=targets))
    found = load(path, on_bad="skip", size=300)
    assert isinstance(found.images, FilePixels)
    good = in_memory(found).subset(torch.from_numpy(np.flatnonzero(targets != 7)))
    everyone = load(path, on_bad="skip")
    assert everyone.digest() == good.digest()
    drawn = {one.numpy().tobytes() for one in found.images[torch.arange(300)]}
    assert drawn <= {one.numpy().tobytes() for one in good.images[torch.arange(len(good))]}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_which_arrays_stay_in_the_file(tmp_path: Path, protocol: int) -> None:
    """Of several, each at its own place, between others that are held."""
    large = np.arange(20_000, dtype=">i4").reshape(100, 200)
    content = {
        "first": large,
        "small": np.arange(5),
        "fortran": np.asfortranarray(large),
        "transposed": large.T,
        "text": b"x" * 70_000,
        "second": large[::-1].copy(),
    }
    found = load_arrays(dump(tmp_path, content, protocol))
    assert found.keys() == content.keys() - {"text"}
    for name, array in found.items():
        assert isinstance(array, FileArray) == (name in ("first", "second") and protocol in STAY)
        read = array.whole() if isinstance(array, FileArray) else array
        assert read.dtype == content[name].dtype
        assert np.array_equal(read, content[name]), name


def test_images_that_do_not_stay_in_it_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(dump(tmp_path, carmons(), 4))
    assert not caplog.text
    load(dump(tmp_path, carmons(), 2))
    assert f"each process keeps {NUMBER * 90:,} bytes" in caplog.text


def test_bytes_that_fill_many_arrays_are_read_once(tmp_path: Path) -> None:
    """Each of 300 names is an array in Fortran's order over the same MiB."""
    one = pickle.dumps({"data": np.asfortranarray(np.zeros((1024, 1024), np.uint8))}, 3)
    content = b"B" + (2**20).to_bytes(4, "little") + bytes(2**20)
    before, after = one.split(content)
    body, end = before[before.index(b"cnumpy") :], after[: after.index(b"b") + 1]
    names = [b"X\x03\x00\x00\x00%03d" % i for i in range(300)]
    kept, again = b"r\xff\xff\x00\x00", b"j\xff\xff\x00\x00"  # as one object of the pickle
    parts = [names[0] + body + content + kept + end + b"s"]
    parts += [name + body + again + end + b"s" for name in names[1:]]
    path = tmp_path / "many.pickle"
    path.write_bytes(b"\x80\x03}" + b"".join(parts) + b".")
    found = [array for array in load_arrays(path).values() if isinstance(array, np.ndarray)]
    assert len(found) == 300
    assert all(np.may_share_memory(found[0], other) for other in found)


def test_a_pickle_that_is_cut_short_under_way_is_named(tmp_path: Path) -> None:
    path = dump(tmp_path, carmons())
    found = load(path)
    os.truncate(path, 20_000)
    with pytest.raises(ValueError, match=rf"^path: {re.escape(str(path))} has been cut short"):
        found.digest()


def test_a_pickle_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    path = dump(tmp_path, carmons())
    whole = path.read_bytes()
    for size in (10, 60_000, len(whole) - 5_000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^unlabeled\.path: .*is refused: it is cut off"):
            load(path)


def test_a_process_keeps_nothing_of_it(tmp_path: Path) -> None:
    number = 50_000
    content = {"data": np.zeros((number, 32, 32, 3), np.uint8)}
    path = dump(tmp_path, content | {"extrapolated_targets": np.arange(number) % 3})
    assert path.stat().st_size > 150e6

    def read() -> None:
        images_of_pickle(str(path), DataSettings(path="x"), 0, 3)[0].digest()

    assert growth(read) < 40e6
