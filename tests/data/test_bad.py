"""A table of bad images and labels: the first is named, or exactly the good ones are left."""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numbered_images import CPU, image, numbers, settings, write_parquet
from picture_folders import write_folder
from PIL import EpsImagePlugin, Image

from robust_accel.data import load_data, load_test, load_to_label
from robust_accel.data.decoding import Pictures, Source, open_image
from robust_accel.data.labels import number_of_classes
from robust_accel.data.reading import read_images
from robust_accel.data.sources import load_splits

KINDS: list[dict[str, Any]] = [{}, {"in_memory": False, "image_size": 5, "num_workers": 0}]


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def frames(form: str) -> bytes:
    others = [image(i) for i in range(1, 12)]
    return encoded(image(0), form, save_all=True, append_images=others)


def png(width: int, height: int) -> bytes:
    """A whole PNG of so many black pixels, or so it says: it has a thousand bytes of them."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


PNG, JPEG = encoded(image(3, (40, 40)), "PNG"), encoded(image(3, (40, 40)), "JPEG")
GIF, WEBP = encoded(image(3), "GIF"), encoded(image(3, (40, 40)), "WEBP", lossless=True)
# ending and content of each file, and what is said of it
BAD: dict[str, tuple[str, bytes, str]] = {
    "empty": ("png", b"", "is empty"),
    "one byte": ("jpg", b"\xff", "has no format that PIL knows"),
    "text": ("png", b"no image", "has no format that PIL knows"),
    "a web page": ("jpg", b"<!DOCTYPE html><title>404</title>", "has no format that PIL knows"),
    "zeros": ("png", bytes(5000), "has no format that PIL knows"),
    "half a png": ("png", PNG[: len(PNG) // 2], "cannot be read"),
    "half a jpeg": ("jpg", JPEG[: len(JPEG) // 2], "cannot be read .*truncated"),
    "half a webp": ("webp", WEBP[: len(WEBP) // 2], "cannot be read|has no format"),
    "half a gif": ("gif", GIF[: len(GIF) // 2], "has no format that PIL knows"),
    "a png's header": ("png", PNG[:33], "has no format that PIL knows"),
    "a jpeg's header": ("jpg", JPEG[:200], "cannot be read|has no format"),
    "a png with other bits": ("png", PNG[:300] + b"\0" * 50 + PNG[350:], "cannot be read"),
    "postscript": ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n", "has the format EPS; allowed are AVIF"),
    "an archive": ("png", b"PK\3\4" + bytes(200), "has no format that PIL knows"),
    "no pixels": ("png", png(0, 5), "cannot be read|has no format"),
    "a bomb": ("png", png(50_000, 50_000), "cannot be read .*2500000000 pixels"),
    "a long bomb": ("png", png(2**31 - 1, 1), "cannot be read .*2147483647 pixels"),
    "a gif of frames": ("gif", frames("GIF"), "holds 12 frames, not one"),
    "a png of frames": ("png", frames("PNG"), "holds 12 frames, not one"),
    "a webp of frames": ("webp", frames("WEBP"), "holds 12 frames, not one"),
    "a tiff of pages": ("tiff", frames("TIFF"), "holds 12 frames, not one"),
    "transparent": ("png", encoded(Image.new("RGBA", (6, 5)), "PNG"), "has transparent pixels"),
    "floats": ("tiff", encoded(Image.new("F", (6, 5)), "TIFF"), "has the mode F"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each bad image, in the order of the table, and behind them 30 good ones: 0 to 29."""
    root = tmp_path_factory.mktemp("bad")
    for i, (ending, content, _) in enumerate(BAD.values()):
        (root / "train" / "cat").mkdir(parents=True, exist_ok=True)
        (root / "train" / "cat" / f"{i:02}.{ending}").write_bytes(content)
    write_folder(root, "train", {"dog": 29, "owl": 1})
    write_folder(root, "test", {"cat": 1, "dog": 1})
    return root


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return Source(load_splits(str(folder), None)["train"], "image", "the folder")


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("name", BAD)
def test_each_is_named_in_one_line(
    source: Source, folder: Path, name: str, options: dict[str, Any]
) -> None:
    row, (ending, _, said) = list(BAD).index(name), BAD[name]
    pictures = Pictures.of(source, torch.tensor([len(BAD), row]))
    message = rf"path: image {row} of the folder \(.*/cat/{row:02}\.{ending}\) ({said}).*; data.on"

    def read() -> None:
        labels = torch.zeros(2, dtype=torch.int64)
        images = read_images(pictures, labels, settings(folder, **options), 0).images
        list(images.batches([torch.arange(2)], CPU))

    with pytest.raises(ValueError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value) and " at 0x" not in str(caught.value)


@pytest.mark.parametrize("options", KINDS)
def test_exactly_the_good_ones_are_left_and_counted(folder: Path, options: dict[str, Any]) -> None:
    data = load_data(settings(folder, on_bad="skip", **options))
    assert sorted(data.train.labels.tolist()) == [1] * 29 + [2]
    if not options:
        found = dict(zip(numbers(data.train), data.train.labels.tolist(), strict=True))
        assert found == {i: 1 + i // 29 for i in range(30)}
    (split, left_out), *others = data.left_out.items()
    assert (split, left_out.images, left_out.of, others) == ("train", len(BAD), len(BAD) + 30, [])
    assert [len(left_out.first), "cat/00.png" in left_out.first[0]] == [3, True]


def test_good_images_of_strange_kinds_are_taken() -> None:
    preview = encoded(image(3), "MPO", save_all=True, append_images=[image(4)])
    for content in (preview, GIF, encoded(image(3), "WEBP")):
        assert open_image({"bytes": content, "path": "named.png"}).size in [(6, 5), (40, 40)]
    with warnings.catch_warnings():  # a photo of 90 megapixels
        warnings.simplefilter("error")
        large = encoded(Image.new("1", (9500, 9500)), "PNG")
        assert open_image({"bytes": large, "path": None}).size == (9500, 9500)


def test_a_bomb_is_refused_by_its_header_whatever_pil_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match=r"has 50000 x 50000 pixels, a bomb by its header"):
        open_image({"bytes": png(50_000, 50_000), "path": None})


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in ("pipe.png", "nothing.png", "."):
        with pytest.raises(ValueError, match="is missing"):
            open_image({"bytes": None, "path": str(tmp_path / path)})


def test_no_program_is_started_for_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PIL leaves PostScript to Ghostscript, whatever the name of the file."""
    program, marker, file = tmp_path / "gs", tmp_path / "executed", tmp_path / "a.png"
    program.write_text(f"#!/bin/sh\ntouch '{marker}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    # it looks once a process; older ones each time
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None, raising=False)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    file.write_bytes(content)
    for picture in ({"bytes": None, "path": str(file)}, {"bytes": content, "path": None}):
        with pytest.raises(ValueError, match=r"^has the format EPS; allowed are AVIF, .*PNG"):
            open_image(picture)
    assert not marker.exists()


@pytest.mark.parametrize("address", ["file://{0}", "zip://x.png::{0}", "simplecache://{0}"])
def test_an_image_at_another_name_of_a_local_pipe_is_not_waited_for(
    tmp_path: Path, address: str
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    path = address.format(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"is not read here: allowed are local paths, and hf://"):
        open_image({"bytes": None, "path": path})


@pytest.mark.parametrize("spoil", [lambda p: p.symlink_to("nowhere"), os.mkfifo])
def test_what_is_no_file_is_named_or_left_out(
    tmp_path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path, "train", {"cat": 2, "dog": 2})
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image by its name")
    spoil(tmp_path / "train" / "cat" / "lost.png")
    with pytest.raises(ValueError, match=r"^path: .*train/cat/lost\.png is a link to nothing, or"):
        load_test(settings(tmp_path, test_split="train"))
    images = load_test(settings(tmp_path, test_split="train", on_bad="skip")).images
    assert numbers(images) == [0, 1, 2, 3]
    assert "1 files of" in caplog.text and "lost.png" in caplog.text


def test_in_memory_the_usual_size_is_kept_where_most_have_it(tmp_path: Path) -> None:
    sizes = [(9, 9), (6, 5), (6, 5), (7, 7), (6, 5)]
    pictures = [image(i, size) for i, size in enumerate(sizes)]
    path = write_parquet(tmp_path, "train", pictures)
    test = load_test(settings(path, test_split="train", on_bad="skip"))
    assert (numbers(test.images), test.images.labels.tolist()) == ([1, 2, 4], [1, 2, 1])
    assert test.left_out is not None and "image 0 of" in test.left_out.first[0]
    path = write_parquet(tmp_path, "none", pictures[:3] + pictures[3:4])
    with pytest.raises(ValueError, match=r"image 1 of .* is 5x6, the first is 9x9; images of sev"):
        load_test(settings(path, test_split="train", on_bad="skip"))


# ---- labels ------------------------------------------------------------------------------------

LABELS: dict[str, tuple[pa.Array, Any, str]] = {
    "none": (pa.array([0, None, 2, 1]), "int64", "no label"),
    "none of a name": (pa.array([0, None, 2, 1]), "names", "no label"),
    "negative": (pa.array([0, -5, 2, 1], pa.int8()), "int8", "the label -5, allowed are 0 to 2"),
    "minus one": (pa.array([0, -1, 2, 1]), "int64", "the label -1, allowed are 0 to 2"),
    "minus one of a name": (pa.array([0, -1, 2, 1]), "names", "the label -1, allowed are 0 to 2"),
    "no name": (pa.array([0, 3, 2, 1]), "names", "the label 3, allowed are 0 to 2"),
    "stray": (pa.array([0, 2_000_000, 2, 1]), "int64", "the label 2000000, allowed are 0 to 2 .or"),
    "the largest": (pa.array([0, 2**63 - 1, 2, 1]), "int64", f"the label {2**63 - 1}, allowed"),
    "beyond it": (pa.array([0, 2**63 + 5, 2, 1], pa.uint64()), "uint64", f"the label {2**63 + 5}"),
    "far beyond": (pa.array([0, 2**64 - 1, 2, 1], pa.uint64()), "uint64", f"the label {2**64 - 1}"),
}


def labelled(path: Path, labels: pa.Array, kind: str) -> Path:
    """Images 0, 1, ... with these labels, which `datasets` itself would not write."""
    feature = datasets.ClassLabel(3) if kind == "names" else datasets.Value(kind)
    pictures = [image(i % 256) for i in range(len(labels))]
    zeros = [0] * len(labels)
    write_parquet(path.parent, path.stem, pictures, zeros, {"label": feature})
    table = pq.read_table(path)
    place = table.schema.get_field_index("label")
    pq.write_table(table.set_column(place, table.schema.field(place), labels), path)
    return path


@pytest.mark.parametrize("name", LABELS)
def test_rows_without_a_class_are_named_or_left_out(tmp_path: Path, name: str) -> None:
    labels, kind, said = LABELS[name]
    path = labelled(tmp_path / "train.parquet", labels, kind)
    for options in KINDS:
        with pytest.raises(ValueError, match=rf"^label_column: 'label': row 1 of .* has {said}"):
            load_test(settings(path, test_split="train", **options))
        test = load_test(settings(path, test_split="train", on_bad="skip", **options))
        assert (test.images.labels.tolist(), test.num_classes) == ([0, 2, 1], 3)
        assert test.selection == "all, 1 bad left out"
        assert test.left_out is not None and "row 1" in test.left_out.first[0]
    listed = load_test(settings(path, test_split="train", on_bad="skip"), ids=(3, 1, 0))
    assert (numbers(listed.images), listed.selection) == (
        [3, 0],
        "3 listed ids (102e3018f319), 1 bad left out",
    )


def test_many_such_rows_are_counted_and_none_left_is_refused(tmp_path: Path) -> None:
    path = labelled(tmp_path / "train.parquet", pa.array([0, None, None, 1]), "int64")
    with pytest.raises(ValueError, match=r"row 1 of .* has no label \(2 such rows\); data\.on_bad"):
        load_test(settings(path, test_split="train"))
    path = labelled(tmp_path / "none.parquet", pa.array([None, -3], pa.int64()), "int64")
    with pytest.raises(ValueError, match=r"row 0 of .* has no label \(2 such rows\)"):
        load_test(settings(path, test_split="train", on_bad="skip"))


@pytest.mark.parametrize(
    ("labels", "num_classes", "found"),
    [
        ([0, 1, 999], None, 1000),  # below 1000 any number is a class
        ([0, 1, 1000], None, 2),
        ([*range(0, 3000, 2)], None, 2999),  # half of the numbers occur
        ([*range(0, 3000, 3)], None, 1000),
        ([*range(600), 1199, 1300], None, 1200),
        ([0, 5, 2_000_000], 2_000_001, 2_000_001),
        ([0, 5, 2_000_000], 10, 6),
        ([0, 5], 10, 6),
    ],
)
def test_plain_integers_are_classes_up_to_where_they_are_dense(
    labels: list[int], num_classes: int | None, found: int
) -> None:
    rows = datasets.Dataset.from_dict({"label": labels})
    assert number_of_classes(rows, "label", num_classes) == found


def test_a_test_split_may_be_sparse_where_the_training_split_is_not(tmp_path: Path) -> None:
    labelled(tmp_path / "train.parquet", pa.array(range(1002)), "int64")
    labelled(tmp_path / "test.parquet", pa.array([0, 1001]), "int64")
    data = load_data(settings(tmp_path))
    assert (data.num_classes, data.test.labels.tolist()) == (1002, [0, 1001])
    assert load_test(settings(tmp_path)).num_classes == 1002


def test_a_number_of_classes_allows_what_is_sparse(tmp_path: Path) -> None:
    for split in ("train", "test"):
        labelled(tmp_path / f"{split}.parquet", pa.array([0, 1, 5000]), "int64")
    for load in (load_data, load_test):
        with pytest.raises(
            ValueError, match=r"row 2 of split t.* the label 5000, allowed are 0 to 1"
        ):
            load(settings(tmp_path))
        assert load(settings(tmp_path), num_classes=6000).num_classes == 5001


def test_a_teachers_bad_labels_are_left_out_with_their_images(tmp_path: Path) -> None:
    write_parquet(tmp_path / "own", "train", [image(i) for i in range(3)])
    write_parquet(tmp_path / "own", "test", [image(i) for i in range(3)])
    more = labelled(tmp_path / "more.parquet", pa.array([0, None, -1, 7, 2]), "int64")
    own = {"path": str(more), "label_column": "label"}
    with pytest.raises(
        ValueError, match=r"^unlabeled\.label_column: 'label': row 1 of .* no label"
    ):
        load_data(settings(tmp_path / "own", unlabeled=own))
    data = load_data(settings(tmp_path / "own", unlabeled=own, on_bad="skip"))
    assert data.unlabeled is not None
    assert (numbers(data.unlabeled), data.unlabeled.labels.tolist()) == ([0, 2, 4], [0, -1, 2])
    assert (data.left_out["unlabeled"].images, data.left_out["unlabeled"].of) == (2, 5)
    rows, _ = load_to_label(settings(tmp_path / "own", unlabeled=own))  # their labels unseen
    assert len(rows) == 5


def test_classes_that_differ_by_capitals_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "test"):
        write_folder(tmp_path, split, {"cat": 1, "Cat": 1, "dog": 1})
    load_data(settings(tmp_path))
    assert "differ only by capitals: [Cat, cat]: each is its own class" in caplog.text
    assert len(caplog.records) == 1
