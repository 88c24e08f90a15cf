"""Read arrays from a pickle that somebody else made, and execute nothing of it.

A pickle is a program. Of its instructions those run here that make numbers, text and containers;
where it calls for numpy's types and functions, it gets records that check what they are called
with. numpy itself sees no more than bytes of the file, and a shape and a type of numbers that they
have been found to fill.
"""

import math
import os
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robust_accel.data.array_files import FileArray
from robust_accel.files import opened

HELD = 2**16  # bytes at most that are read at once, where they could stay in the file
_INSTRUCTIONS = 2**20  # in a pickle: a list of a million numbers, say, beside the arrays
_DIMENSIONS = 32  # of an array, at most: what every numpy has
# Instructions that pickle's own reader runs. Not among them: calls of classes, extensions,
# persistent names, sets, and what comes from outside of the file.
_PLAIN = [
    "PROTO", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "SHORT_BINBYTES", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE",
    "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "PUT", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL",
]  # fmt: skip
_CODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
_NAMES = {code: name for name, code in _CODES.items()}
_Unpickler: Any = pickle._Unpickler  # the one in Python, as pickle's documentation describes it


def load_arrays(path: str | Path) -> dict[str, np.ndarray | FileArray]:
    """Arrays and numbers of a pickled dictionary, by name; text beside them is left out.

    Arrays of more than 64 KiB stay in the file, where it holds their bytes as they are: of protocol
    3 or later, in C's order. Others are held, twice where an old protocol has written them as text.

    Raises:
        ValueError: ``path: ...``: no such file, no such pickle, or anything but arrays of numbers,
            numbers, text and lists of these in it.
    """
    try:
        with ExitStack() as closing:
            file = closing.enter_context(opened(path))
            content = _ArrayUnpickler(file, str(path)).load()
            if not isinstance(content, dict):
                raise ValueError(f"it must hold a dictionary, found {type(content).__name__}")
            done: dict[int, np.ndarray | FileArray | None] = {}  # one list may have many names
            for name, value in content.items():
                if id(value) not in done:
                    done[id(value)] = _array(name, value)
            found = {name: done[id(value)] for name, value in content.items()}
            if any(isinstance(array, FileArray) for array in found.values()):
                closing.pop_all()  # it is read from yet
            return {name: array for name, array in found.items() if array is not None}
    except OSError as error:
        raise ValueError(f"path: {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a broken pickle may raise anything
        known = isinstance(error, ValueError | pickle.UnpicklingError)
        why = str(error)[:200] if known else f"it is damaged ({type(error).__name__})"
        raise ValueError(f"path: {path} is refused: {why}") from None


def _array(name: str, value: Any) -> np.ndarray | FileArray | None:
    """The value as an array, or None for text."""
    if isinstance(value, _Array) and value.array is not None:
        return value.array
    items = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(item, str | bytes | FileArray) for item in items):
        return None
    if all(isinstance(item, int | float) for item in items):
        array = np.asarray(value)
        if array.dtype.kind in "biuf":
            return array
    raise ValueError(f"{_told(name)} holds objects, not numbers")


def _told(value: Any) -> str:
    """Text, or what else it is: a tuple of tuples of one tuple could be told for ever."""
    return repr(value[:80]) if isinstance(value, str) else f"of {type(value).__name__}"


class _Global:
    """A name that the pickle imports: nothing is imported."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Type:
    """A ``numpy.dtype`` of plain numbers."""

    def __init__(self, name: Any) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?[biufc]\d{1,2}", name):
            raise ValueError(f"it holds objects, not numbers: the type {_told(name)}")
        self.dtype = np.dtype(name)

    def set_state(self, state: Any) -> None:
        """``(version, byte order, subarray, names, fields, ...)``."""
        if (
            not isinstance(state, tuple)
            or len(state) != 8
            or any(x is not None for x in state[2:5])
        ):
            raise ValueError("an array's type has parts: it is not of plain numbers")
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError(f"an array has the byte order {_told(state[1])}")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A ``numpy.ndarray``, empty until its content is known."""

    def __init__(self) -> None:
        self.array: np.ndarray | FileArray | None = None

    def fill(self, content: Any, kind: Any, shape: Any, order: Literal["C", "F"]) -> None:
        """View bytes as numbers; ValueError unless they are as many as the shape says.

        Bytes that are still in the file stay there, and are an array in C's order.
        """
        if not isinstance(content, bytes | np.ndarray | FileArray) or not isinstance(kind, _Type):
            raise ValueError("an array's content is not bytes of plain numbers")
        if not isinstance(shape, tuple) or len(shape) > _DIMENSIONS:
            raise ValueError(f"an array's shape is {_told(shape)}")
        if not all(type(length) is int and 0 <= length < 2**40 for length in shape):
            raise ValueError("an array's shape is not of whole numbers")
        if math.prod(shape) * kind.dtype.itemsize != len(content):
            raise ValueError(f"an array of shape {list(shape)} has {len(content)} bytes")
        if isinstance(content, FileArray):
            self.array = replace(content, shape=shape, dtype=kind.dtype)
        else:
            self.array = np.frombuffer(content, kind.dtype).reshape(shape, order=order)


class _ArrayUnpickler(_Unpickler):
    def __init__(self, file: BufferedReader, path: str) -> None:
        self._size = os.fstat(file.fileno()).st_size
        self._instructions = self._encoded = 0
        self._bounded = _Bounded(file, path, self._size)
        self._held: dict[int, np.ndarray] = {}  # by the place in the file
        super().__init__(self._bounded, encoding="latin1")  # strings of Python 2

    def find_class(self, module: str, name: str) -> _Global:
        whole = f"{module}.{name}"
        if whole not in _CALLED and whole != _ARRAY:
            raise ValueError(f"it holds {_told(whole)}, not only arrays")
        return _Global(whole)

    def tick(self) -> None:
        self._instructions += 1
        if self._instructions > _INSTRUCTIONS:
            raise ValueError(f"it has more than {_INSTRUCTIONS} instructions: too many for arrays")

    def encode(self, text: Any) -> bytes:
        """Bytes that older protocols have written as text; all of them fit into the file."""
        if not isinstance(text, str):
            raise ValueError("it makes bytes of what is no text")
        self._encoded += len(text)
        if self._encoded > self._size:
            raise ValueError("it makes more bytes than the file has")
        return text.encode("latin1")

    def held(self, content: Any) -> Any:
        """Bytes that are still in the file are read: once, however many arrays they fill."""
        if not isinstance(content, FileArray):
            return content
        if content.offset not in self._held:
            self._held[content.offset] = content.whole()
        return self._held[content.offset]

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or function.name not in _CALLED:
            raise ValueError("it calls what is no function of numpy")
        if not isinstance(arguments, tuple):
            raise ValueError(f"{function.name} is called with no arguments")
        self.append(_CALLED[function.name](self, *arguments))

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, _Type):
            made.set_state(state)
        elif isinstance(made, _Array):
            if not isinstance(state, tuple) or len(state) != 5:
                raise ValueError("an array's state is none of numpy's")
            _, shape, kind, fortran, content = state
            content = self.encode(content) if isinstance(content, str) else content
            if fortran is True or fortran == 1:
                made.fill(self.held(content), kind, shape, "F")
            else:
                made.fill(content, kind, shape, "C")
        else:
            raise ValueError("it sets the state of what is no array")

    def load_frame(self) -> None:
        """What is in a frame is read like what is not: then bytes lie where the file is at."""
        self._bounded.check(int.from_bytes(self.read(8), "little"))

    def load_binbytes(self) -> None:
        self._load_bytes(4)

    def load_binbytes8(self) -> None:
        self._load_bytes(8)

    def load_bytearray8(self) -> None:
        self._load_bytes(8)

    def _load_bytes(self, width: int) -> None:
        """Bytes after their number, which ``width`` bytes tell; many of them stay in the file."""
        size = int.from_bytes(self.read(width), "little")
        self.append(self.read(size) if size <= HELD else self._bounded.passed_over(size))

    def load_setitem(self) -> None:
        value, name = self.stack.pop(), self.stack.pop()
        self._set([name, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        names, values, target = items[::2], items[1::2], self.stack[-1]
        if not isinstance(target, dict) or not all(type(name) is str for name in names):
            raise ValueError("a dictionary's keys must be text")
        target.update(zip(names, values, strict=True))


class _Bounded:
    """A file of which no more is read, and no more memory asked for, than there is left of it."""

    def __init__(self, file: BufferedReader, path: str, size: int) -> None:
        self._file, self._path, self._left = file, path, size

    def check(self, size: int) -> None:
        """Refuse to take more bytes than there are."""
        if not 0 <= size <= self._left:
            raise ValueError("it is cut off, or no pickle")

    def read(self, size: int) -> bytes:
        self.check(size)
        data = self._file.read(size)
        if len(data) != size:  # it has become shorter
            raise ValueError("it is cut off, or no pickle")
        self._left -= size
        return data

    def readline(self) -> bytes:
        line = self._file.readline()
        self._left -= len(line)
        return line

    def passed_over(self, size: int) -> FileArray:
        """The next bytes, which stay in the file."""
        self.check(size)
        start = self._file.tell()
        self._file.seek(size, os.SEEK_CUR)
        self._left -= size
        return FileArray(self._path, self._file, start, (size,), np.dtype(np.uint8))


def _reconstruct(reader: _ArrayUnpickler, kind: Any, shape: Any, code: Any) -> _Array:
    if not isinstance(kind, _Global) or kind.name != _ARRAY:
        raise ValueError("an array is of no plain class")
    return _Array()


def _frombuffer(
    reader: _ArrayUnpickler, content: Any, kind: Any, shape: Any, order: Any, axes: Any = None
) -> _Array:
    if axes is not None and not (
        isinstance(axes, tuple) and all(type(axis) is int for axis in axes)
    ):
        raise ValueError(f"an array's axes are {_told(axes)}")
    made = _Array()
    if order == "F" or axes is not None:
        content = reader.held(content)
    made.fill(content, kind, shape, "F" if order == "F" else "C")
    if axes is not None and isinstance(made.array, np.ndarray):
        made.array = made.array.transpose(axes)
    return made


def _type(reader: _ArrayUnpickler, name: Any, align: Any = 0, copy: Any = 0) -> _Type:
    return _Type(name)


def _encode(reader: _ArrayUnpickler, text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"text has the encoding {_told(encoding)}")
    return reader.encode(text)


def _no_bytes(reader: _ArrayUnpickler) -> bytes:
    return b""


# By the names of numpy 1 and 2, and of Python 2 and 3.
_CALLED: dict[str, Callable[..., Any]] = {
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _frombuffer for core in ("core", "_core")},
    "numpy.dtype": _type,
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "__builtin__.bytes": _no_bytes,
}
_ARRAY = "numpy.ndarray"


class _Dispatch(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Any:
        raise ValueError(f"it is no pickle of arrays: {_NAMES.get(code, f'byte {code}')}")


def _counted(run: Callable[[Any], None]) -> Callable[[Any], None]:
    def counted(reader: _ArrayUnpickler) -> None:
        reader.tick()
        run(reader)

    return counted


def _dispatch(own: Iterable[str]) -> _Dispatch:
    plain = {_CODES[name]: _Unpickler.dispatch[_CODES[name]] for name in _PLAIN}
    replaced = {_CODES[name]: getattr(_ArrayUnpickler, f"load_{name.lower()}") for name in own}
    return _Dispatch({code: _counted(run) for code, run in (plain | replaced).items()})


_OWN = [
    "FRAME", "REDUCE", "BUILD", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "SETITEM", "SETITEMS", "DICT",
]  # fmt: skip
_ArrayUnpickler.dispatch = _dispatch(_OWN)
