"""Reads pickles that hypothesis makes, in a process of little memory."""

import pickle
import resource
import struct
import traceback
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robust_accel.data import array_pickle
from robust_accel.data.array_files import FileArray

MEMORY = 2**30  # bytes that the reader may map beside what importing has taken

CALLED = [
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("builtins", "bytes"),
    ("builtins", "eval"),
    ("os", "system"),
]
SIZES = [0, 1, 7, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]
texts = st.sampled_from(["", "u1", "i8", "O8", "V8", "S3", "<", ">", "|", "C", "F", "latin1", "a"])


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(pair: tuple[str, str]) -> bytes:
    return f"c{pair[0]}\n{pair[1]}\n".encode()


def declared(pair: tuple[bytes, int], content: bytes) -> bytes:
    """An instruction whose content may be shorter than it says."""
    code, size = pair
    width = {b"T": 4, b"B": 4, b"X": 4, b"\x8b": 4}.get(code, 8)
    return code + size.to_bytes(8, "little")[:width] + content


contents = st.binary(max_size=24)
instructions = st.one_of(
    st.sampled_from([bytes([code]) for code in range(256)]),
    st.sampled_from([b"(", b"t", b"l", b"d", b"R", b"b", b"s", b"u", b"a", b"e", b"2", b"0", b"."]),
    st.sampled_from([b"\x85", b"\x86", b"\x87", b")", b"]", b"}", b"N", b"\x88", b"\x89", b"\x94"]),
    texts.map(text),
    contents.map(lambda content: b"C" + bytes([len(content)]) + content),
    contents.map(lambda content: b"U" + bytes([len(content)]) + content),
    st.integers(0, 255).map(lambda value: b"K" + bytes([value])),
    st.integers(-(2**31), 2**31 - 1).map(lambda value: b"J" + struct.pack("<i", value)),
    st.integers().map(lambda value: b"I%d\n" % value),
    st.sampled_from(CALLED).map(named),
    st.integers(0, 3).map(lambda index: b"h" + bytes([index])),
    st.sampled_from(SIZES).map(lambda index: b"r" + (index % 2**32).to_bytes(4, "little")),
    st.builds(
        declared,
        st.tuples(
            st.sampled_from([b"T", b"B", b"X", b"\x8b", b"\x8e", b"\x8d", b"\x95", b"\x96"]),
            st.sampled_from(SIZES),
        ),
        contents,
    ),
    # whole calls, or few examples would come as far as numpy
    st.builds(
        lambda name, parts: named(name) + b"(" + b"".join(parts) + b"tR",
        st.sampled_from(CALLED),
        st.lists(st.one_of(texts.map(text), st.just(b"K\x00"), st.just(b"N")), max_size=4),
    ),
)
programs = st.lists(instructions, max_size=30).map(lambda parts: b"".join(parts) + b".")


def sound(protocol: int, dtype: str, shape: list[int], fortran: bool) -> bytes:
    """A pickle as numpy makes it."""
    array = np.ones(shape, dtype, order="F" if fortran else "C")
    return pickle.dumps({"data": array, "more": [1, 2], "text": "t"}, protocol)


sounds = st.builds(
    sound,
    st.integers(0, 5),
    st.sampled_from(["u1", "<i8", ">i4", "O", "S3", "U2", "M8[s]", "u1,f4", "(2,)u1"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.booleans(),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A sound pickle with bytes that were changed, cut out or put in."""
    content = bytearray(draw(sounds))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.integers(0, 3))
        content[place : place + length] = draw(st.one_of(st.binary(max_size=4), instructions))
    return bytes(content)


def read_hostile(examples: int, held: int, pickled: Path, told: Path) -> None:
    """Write pickles to a file and read them; what fails is told in another.

    More than ``held`` bytes stay in the file.

    To be run in a process of its own: a crash leaves the pickle that did it.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))

    array_pickle.HELD = held

    @settings(
        max_examples=examples, deadline=5000, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.one_of(programs, mutated()))
    def reads(content: bytes) -> None:
        pickled.write_bytes(content)
        arrays: dict[str, np.ndarray | FileArray] = {}
        said = "path: "
        try:
            arrays = array_pickle.load_arrays(pickled)
        except ValueError as error:
            said = str(error)
        assert said.startswith("path: ")
        assert len(said.splitlines()) == 1
        assert "MemoryError" not in said
        for array in arrays.values():
            assert array.dtype.kind in "biufc"
            read = array.whole() if isinstance(array, FileArray) else array
            read.tobytes()  # it lies where it says

    try:
        reads()
    except BaseException:
        told.write_text(traceback.format_exc())
        raise
