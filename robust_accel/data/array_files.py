"""Arrays in ``.npz`` files and folders of ``.npy`` files: found by their headers, read by rows.

Nothing is unpickled: arrays of objects are refused by their headers. What is opened stays in the
file; what the kernel keeps of it is shared among all processes, and part of none's memory.
"""

import errno
import hashlib
import logging
import math
import os
import shutil
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import datasets
import numpy as np
from filelock import FileLock

from robust_accel.files import opened, remove_incomplete, written_whole

logger = logging.getLogger(__name__)

FOLDER_HAS = "images.npy"  # by which a folder of arrays is known
_NPY = ".npy"
_NO_ZIP = "it is no .npz, or damaged or cut off"
_LONGEST = 600  # characters of a message
_BLOCK = 2**20  # bytes that are unpacked at a time
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member of a zip: ... lengths of name and extra


@dataclass(frozen=True)
class FileArray:
    """An array that stays in its file: rows are read when they are asked for.

    They are read, not mapped: a file that is cut short meanwhile is an error, not the end of the
    process, and what the kernel keeps of it is not counted as the process's memory.

    Attributes:
        path: What errors name.
        file, offset: Where its first byte is.
        shape, dtype: Of the numbers that follow, in C's order.
        crc: The CRC-32 of the ``.npy`` member, where a zip has told one.
    """

    path: str
    file: BufferedReader
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    crc: int | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Some rows, [B, ...]; those that follow one another in the file at once.

        Args:
            numbers: Of the rows, [B].

        Raises:
            ValueError: ``path: ...``: the file has become shorter, or cannot be read any more.
        """
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"{self.path} has the rows 0 to {len(self) - 1}")
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        content, size = _bytes_of(found), self._bytes_of_row
        for start, end, first in _runs(numbers):
            self._read(content[start * size : end * size], first * size)
        return found

    def whole(self) -> np.ndarray:
        """All rows; raises as ``rows``."""
        found = np.empty(self.shape, self.dtype)
        self._read(_bytes_of(found), 0)
        return found

    def soon(self, numbers: np.ndarray) -> None:
        """Let the kernel read rows [B] ahead, all at once, while others are worked on."""
        if not hasattr(os, "posix_fadvise"):  # macOS
            return
        size = self._bytes_of_row
        for start, end, first in _runs(numbers):
            place, length = self.offset + first * size, (end - start) * size
            os.posix_fadvise(self.file.fileno(), place, length, os.POSIX_FADV_WILLNEED)

    @property
    def _bytes_of_row(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _read(self, content: memoryview, place: int) -> None:
        """Fill ``content`` with what begins at a byte of the array."""
        place += self.offset
        while content:
            try:
                number = os.preadv(self.file.fileno(), [content], place)
            except OSError as error:
                raise ValueError(f"path: {self.path} cannot be read: {error.strerror}") from None
            if number == 0:
                raise ValueError(
                    f"path: {self.path} has been cut short while it was read: it ends at byte "
                    f"{os.fstat(self.file.fileno()).st_size:,}, and byte {place:,} is wanted"
                )
            content, place = content[number:], place + number


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Parts of rows that follow one another: where each begins and ends, and its first row."""
    starts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)
    ends = [*starts[1:].tolist(), len(numbers)]
    return zip(starts.tolist(), ends, numbers[starts].tolist(), strict=False)  # of no rows none


@dataclass(frozen=True)
class StoredArray:
    """An array in a file, of which only the header was read."""

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    header: int  # bytes before the numbers
    member: zipfile.ZipInfo | None  # None: the file is ``name.npy`` of a folder

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    def open(self) -> FileArray:
        """Open it where it lies; unpack it first into the cache of ``datasets`` if compressed.

        Raises:
            ValueError: ``path: ...``.
        """
        with refused(self.path):
            member, place = self.member, self.path
            if member is None:
                place = str(Path(place, f"{self.name}{_NPY}"))
            elif member.compress_type != zipfile.ZIP_STORED:
                place = str(_unpacked(place, member))
            file = opened(place)
            start = _start_of(member, file) if member is not None and place == self.path else 0
            crc = member.CRC if member else None
            return FileArray(place, file, start + self.header, self.shape, self.dtype, crc)


def holds_arrays(path: str, image: str | None = None) -> bool:
    """Whether a path is a ``.npz`` or a folder of arrays, of which one has this name."""
    named = FOLDER_HAS if image is None else f"{image}{_NPY}"
    return Path(path).suffix == ".npz" or Path(path, named).is_file()


def array_names(path: str) -> list[str]:
    """The arrays of a ``.npz`` or a folder.

    Raises:
        ValueError: ``path: ...``: it cannot be read, is no such file, or cut off.
    """
    with refused(path):
        if os.path.isdir(path):
            return sorted(place.stem for place in Path(path).glob(f"*{_NPY}"))
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith(_NPY)]
            return [name.removesuffix(_NPY) for name in names]


def stored_array(path: str, name: str) -> StoredArray:
    """One of ``array_names``, its header read.

    Raises:
        ValueError: ``path: ...``: as ``array_names``; or it is of objects, has parts, is in
            Fortran's order, or has not as many bytes as its shape says.
    """
    with refused(path):
        if os.path.isdir(path):
            with opened(Path(path, f"{name}{_NPY}")) as file:
                return _header(path, name, file, os.fstat(file.fileno()).st_size, None)
        with opened(path) as file, zipfile.ZipFile(file) as archive:
            member = archive.getinfo(f"{name}{_NPY}")
            with archive.open(member) as content:
                return _header(path, name, content, member.file_size, member)


@contextmanager
def refused(path: str) -> Iterator[None]:
    """What goes wrong with a file as one sentence: a stranger's may raise anything."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EINVAL and error.filename is None:  # a zip's places are before it
            raise ValueError(f"path: {path} is refused: {_NO_ZIP}") from None
        inside = error.filename not in (None, path)
        why = f"{error.filename}: {error.strerror}" if inside else error.strerror or error
        raise ValueError(f"path: {path} cannot be read: {why}") from None
    except zipfile.BadZipFile as error:
        raise ValueError(f"path: {path} is refused: {_NO_ZIP}: {error}") from None
    except Exception as error:
        known = isinstance(error, ValueError | NotImplementedError | RuntimeError)
        why = (
            " ".join(str(error).split())[:_LONGEST]
            if known
            else f"damaged ({type(error).__name__})"
        )
        raise ValueError(f"path: {path} is refused: {why}") from None


def _header(
    path: str, name: str, file: IO[bytes], size: int, member: zipfile.ZipInfo | None
) -> StoredArray:
    """Read an array's header; ``size`` is of the whole ``.npy`` file, in bytes."""
    try:
        version = np.lib.format.read_magic(file)
        readers: dict[Any, Any] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"version {version} of the format")
        shape, fortran, dtype = readers[version](file)
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"{name!r} is no array of numbers: {error}") from None
    if dtype.hasobject or dtype.kind not in "biuf":
        raise ValueError(f"{name!r} holds objects or text, not numbers: {str(dtype)[:80]}")
    if fortran and len(shape) > 1:
        raise ValueError(
            f"{name!r} is in Fortran's order, an image's pixels all over the file: save "
            "numpy.ascontiguousarray of it"
        )
    start = file.tell()
    wanted = start + math.prod(shape) * dtype.itemsize
    if wanted != size or min(shape, default=0) < 0:
        raise ValueError(f"{name!r} of shape {list(shape)} wants {wanted} bytes, found {size}")
    return StoredArray(path, name, shape, dtype, start, member)


def _start_of(member: zipfile.ZipInfo, file: BufferedReader) -> int:
    """Where the content of a member begins that is not compressed."""
    file.seek(member.header_offset)
    content = file.read(_LOCAL_HEADER.size)
    if len(content) < _LOCAL_HEADER.size or member.flag_bits & 1:
        raise ValueError(f"{member.filename!r} is cut off or encrypted")
    magic, name, extra = _LOCAL_HEADER.unpack(content)
    start = member.header_offset + _LOCAL_HEADER.size + name + extra
    there = os.fstat(file.fileno()).st_size - start
    if magic != zipfile.stringFileHeader or min(there, member.compress_size) < member.file_size:  # type: ignore[attr-defined]
        raise ValueError(f"{member.filename!r} is cut off")
    return int(start)


def write_npz(
    path: Path, arrays: Mapping[str, tuple[tuple[int, ...], Iterable[np.ndarray]]]
) -> None:
    """Write a ``.npz``, in one move, that is read as it is: not compressed, and never held whole.

    Args:
        arrays: By their names: shape, and what follows one another along the first dimension.
    """
    with written_whole(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, (shape, parts) in arrays.items():
            with archive.open(f"{name}{_NPY}", "w", force_zip64=True) as member:
                header: dict[str, Any] = {"fortran_order": False, "shape": shape}
                for number, part in enumerate(parts):
                    if number == 0:
                        header["descr"] = np.lib.format.dtype_to_descr(part.dtype)
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(np.ascontiguousarray(part).data)


# ---- the copies of what is compressed ----------------------------------------------------------


def _unpacked(path: str, member: zipfile.ZipInfo) -> Path:
    """A compressed member as a file, which the first process of a machine makes.

    It is made anew when the file changes; the copy of what the file was is then removed.
    """
    with opened(path) as file, zipfile.ZipFile(file) as archive:
        about = os.fstat(file.fileno())
        named = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:20]
        folder = Path(datasets.config.HF_DATASETS_CACHE, "robust_accel-arrays", named)
        folder.mkdir(parents=True, exist_ok=True)
        state = f"{about.st_size}-{about.st_mtime_ns}-"
        own = hashlib.sha256(member.filename.encode()).hexdigest()[:8]
        copy = folder / f"{state}{member.CRC:08x}-{own}{_NPY}"
        with FileLock(f"{folder}.lock"):
            if copy.exists() and copy.stat().st_size == member.file_size:
                return copy
            remove_incomplete(folder)
            for other in folder.glob(f"*{_NPY}"):
                if not other.name.startswith(state):
                    other.unlink()
            free = shutil.disk_usage(folder).free
            if free < member.file_size:
                raise ValueError(
                    f"{member.filename!r} is compressed, and {folder} has no room for the "
                    f"{member.file_size:,} bytes that it has unpacked ({free:,} are free): set "
                    "HF_DATASETS_CACHE, or save the file by numpy.savez"
                )
            logger.warning(
                "%s of %s is compressed: it is unpacked once, into %s (%s bytes)",
                member.filename,
                path,
                folder,
                f"{member.file_size:,}",
                extra={"of_one_process": True},
            )
            with (
                written_whole(copy) as place,
                archive.open(member) as source,
                open(place, "wb") as target,
            ):
                shutil.copyfileobj(source, target, _BLOCK)
    return copy
