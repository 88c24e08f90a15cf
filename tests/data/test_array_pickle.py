"""The reader of arrays in pickles: what numpy writes is read, and whatever else is refused."""

import multiprocessing
import pickle
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_pickles import read_hostile

from robust_accel.data.array_pickle import HELD, load_arrays


def write(folder: Path, content: bytes) -> Path:
    path = folder / "arrays.pickle"
    path.write_bytes(content)
    return path


ARRAYS = {
    "bytes": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
    "transposed": np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(0, 2, 1),
    "strided": np.arange(20, dtype=np.int16)[::3],
    "big endian": np.arange(5, dtype=">i4"),
    "0-d": np.array(1.5),
    "empty": np.zeros((0, 3), np.float32),
    "truth": np.array([True, False]),
    "complex": np.array([1 + 2j]),
    "read-only": np.frombuffer(b"abc", np.uint8),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_come_back_as_they_were(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps(ARRAYS, protocol)
    for old in (content, content.replace(b"numpy._core.", b"numpy.core.")):
        if protocol >= 4 and old != content:
            continue  # lengths stand before its names
        found = load_arrays(write(tmp_path, old))
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert found[name].dtype == array.dtype
            assert np.array_equal(found[name], array), name


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numbers_come_as_arrays_and_text_is_left_out(tmp_path: Path, protocol: int) -> None:
    """CIFAR's own batches hold labels and file names in lists."""
    content = {"labels": [1, 2, -3], "shares": (0.5, 1), "n": 7, "batch_label": "one of five"}
    content |= {"filenames": ["a.png", "b.png"], "none": []}
    found = load_arrays(write(tmp_path, pickle.dumps(content, protocol)))
    assert {name: array.tolist() for name, array in found.items()} == {
        "labels": [1, 2, -3],
        "shares": [0.5, 1.0],
        "n": 7,
    }


@pytest.mark.parametrize(
    "text", [b"S'\\x00\\x01\\xff'\n", b"U\x03\x00\x01\xff", b"T\x03\0\0\0\0\1\xff"]
)
def test_an_array_that_python_2_wrote_is_read(tmp_path: Path, text: bytes) -> None:
    content = (
        b"(dS'data'\ncnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(L3L\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n"
        + text
        + b"tbs."
    )
    assert load_arrays(write(tmp_path, content))["data"].tolist() == [0, 1, 255]


@pytest.mark.parametrize("protocol", [2, 5])
def test_no_more_is_held_than_text_twice_and_nothing_of_bytes(
    tmp_path: Path, protocol: int
) -> None:
    size = 2**22
    path = write(tmp_path, pickle.dumps({"data": np.zeros(size, np.uint8)}, protocol))
    tracemalloc.start()
    try:
        load_arrays(path)
        most = 2.2 if protocol == 2 else 0.1
        assert tracemalloc.get_traced_memory()[1] < most * path.stat().st_size
    finally:
        tracemalloc.stop()


# ---- what is refused ---------------------------------------------------------------------------

TEXT = b"X" + struct.pack("<I", 4) + b"name"
DTYPE = b"cnumpy\ndtype\n(X\x02\x00\x00\x00%bI0\nI1\ntR"
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR"


def filled(dtype: bytes, content: bytes, shape: bytes = b"(K\x01t") -> bytes:
    return EMPTY + b"(K\x01" + shape + DTYPE % dtype + b"I00\n" + content + b"tb"


def dictionary(value: bytes) -> bytes:
    return b"\x80\x04}" + TEXT + value + b"s."


POINTER = b"C\x08" + struct.pack("<Q", 0x41414141)
DEEP = b"]" * 100_000 + b"a" * 99_999
DOUBLED = b"K\x01K\x02\x86" + b"2\x86" * 60  # 2^60 numbers, if anybody went through them
BOMB = b"(" + b"X\x10\x00\x00\x00" + b"x" * 16 + b"q\x00" + b"h\x00" * 1000 + b"l"
PAYLOADS: dict[str, tuple[bytes, str]] = {
    "objects over raw bytes": (dictionary(filled(b"O8", POINTER)), "holds objects"),
    "objects over raw bytes in a list": (
        dictionary(b"](cnumpy\nndarray\n((K\x01t" + DTYPE % b"O8" + POINTER + b"tRe"),
        "holds objects",
    ),
    "objects by ndarray": (
        dictionary(b"cnumpy\nndarray\n((K\x01t" + DTYPE % b"u1" + POINTER + b"tR"),
        "calls what is no function",
    ),
    "objects by _frombuffer": (
        dictionary(b"cnumpy.core.numeric\n_frombuffer\n(" + POINTER + DTYPE % b"O8" + b"(K\x01ttR"),
        "holds objects",
    ),
    "a type's state with objects": (
        dictionary(
            DTYPE % b"u1" + b"(K\x03X\x01\x00\x00\x00|" + TEXT + b"NNJ\xff\xff\xff\xffK\x08K?tb"
        ),
        "has parts",
    ),
    "text of numpy": (dictionary(filled(b"S8", POINTER)), "holds objects"),
    "dates": (dictionary(filled(b"M8", POINTER)), "holds objects"),
    "bytes without a type": (dictionary(filled(b"V8", POINTER)), "holds objects"),
    "a shape beyond the bytes": (
        dictionary(filled(b"u1", POINTER, b"(J\xff\xff\xff\x7ft")),
        "has 8 bytes",
    ),
    "a negative shape": (
        dictionary(filled(b"u1", POINTER, b"(J\xff\xff\xff\xfft")),
        "whole numbers",
    ),
    "a shape that wraps": (
        dictionary(filled(b"u1", b"C\x00", b"(" + b"\x8a\x05\0\0\0\0\x10" * 4 + b"t")),
        "has 0 bytes",
    ),
    "a call of eval": (dictionary(b"cbuiltins\neval\n(" + TEXT + b"tR"), "builtins.eval"),
    "an instance": (b"(ios\nsystem\n.", "INST"),
    "an object": (b"(cos\nsystem\no.", "os.system"),
    "a new object": (dictionary(b"cnumpy\nndarray\n)\x81"), "NEWOBJ"),
    "an extension": (b"\x82\x01.", "EXT1"),
    "a persistent name": (b"Pname\n.", "PERSID"),
    "a buffer from elsewhere": (b"\x97.", "NEXT_BUFFER"),
    "bytes to come": (b"\x8e" + b"\xff" * 7 + b"\x7f.", "cut off"),
    "an array of bytes to come": (b"\x96" + b"\xff" * 5 + b"\0\0\0.", "cut off"),
    "text to come": (b"\x8d" + b"\xff" * 5 + b"\0\0\0.", "cut off"),
    "a frame to come": (b"\x80\x04\x95" + b"\xff" * 5 + b"\0\0\0.", "cut off"),
    "a number to come": (b"\x8b\xff\xff\xff\x7f.", "cut off"),
    "a number of many digits": (dictionary(b"I" + b"9" * 5000 + b"\n"), "refused"),
    "a memo of two thousand million": (b"N\x72\xff\xff\xff\x7f.", "must hold a dictionary"),
    "a deep list": (dictionary(DEEP), "holds objects"),
    "a deep name": (b"}" + b")" + b"\x85" * 100_000 + b"Ns.", "keys must be text"),
    "doubled tuples": (dictionary(DOUBLED), "holds objects"),
    "doubled tuples for a shape": (dictionary(filled(b"u1", POINTER, DOUBLED)), "whole numbers"),
    "a list of itself": (dictionary(b"]q\x00h\x00a"), "holds objects"),
    "bytes encoded again and again": (
        dictionary(
            b"c_codecs\nencode\nq\x01"
            + TEXT * 1
            + b"q\x00"
            + b"0h\x01h\x00X\x06\0\0\0latin1\x86R" * 900
        ),
        "refused",
    ),
    "a state of what is no array": (dictionary(b"]Nb"), "no array"),
    "marks without end": (b"(" * 1_100_000, "too many"),
    "nothing": (b"", "cut off"),
    "no pickle": (b"\x89PNG\r\n\x1a\n", "refused"),
    "an array that is not filled": (dictionary(EMPTY), "holds objects"),
    "an array within": (dictionary(b"]" + filled(b"u1", b"C\x01a") + b"a"), "holds objects"),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_hostile_pickle_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    content, message = PAYLOADS[name]
    path, start = write(tmp_path, content), time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        load_arrays(path)
    assert str(caught.value).startswith(f"path: {path} ")
    assert len(str(caught.value).splitlines()) == 1
    assert time.process_time() - start < 10


def test_many_names_of_one_list_are_one_array(tmp_path: Path) -> None:
    numbers = list(range(2000))
    content: dict[str, Any] = {str(i): numbers for i in range(3000)}
    found = load_arrays(write(tmp_path, pickle.dumps(content)))
    assert len(found) == 3000
    assert len({id(array) for array in found.values()}) == 1


def fuzz(folder: Path, examples: int, held: int) -> None:
    """In a process of its own, which may crash; forked, as importing takes longer than reading."""
    pickled, told = folder / "last.pickle", folder / "told"
    process = multiprocessing.get_context("fork").Process(
        target=read_hostile, args=(examples, held, pickled, told)
    )
    process.start()
    process.join(900)
    told_text = told.read_text() if told.exists() else ""
    last = pickled.read_bytes() if pickled.exists() else b""
    process.kill()
    assert process.exitcode == 0, f"{process.exitcode} at {last!r}: {told_text}"


@pytest.mark.parametrize("held", [HELD, 2])
def test_no_pickle_crashes_or_allocates(tmp_path: Path, held: int) -> None:
    fuzz(tmp_path, 200, held)


@pytest.mark.long
def test_no_pickle_of_thousands_crashes_or_allocates(tmp_path: Path) -> None:
    fuzz(tmp_path, 5000, 2)
