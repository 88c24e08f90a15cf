"""A tar file in WebDataset's form: its samples, and where in it their images lie."""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from robust_accel.files import opened

_LONGEST = 2**20  # bytes of a label's member
_INT64 = 2**63


@dataclass
class Sample:
    """Members of one key that follow one another: an image, and integers that may be its label.

    Attributes:
        name: Of the image's member; the key where there is none.
        offset, size: Of its bytes in the file; -1 where there is none.
        numbers: The integer of ``.cls`` as ``cls``, and those of a ``.json`` by their names.
    """

    name: str
    offset: int = -1
    size: int = -1
    numbers: dict[str, int] = field(default_factory=dict)


def samples(path: str, *, skip: bool = False) -> Iterator[Sample]:
    """Read the headers of a tar file, and labels: no image.

    Args:
        skip: A label that is none is passed over: its sample has none.

    Raises:
        ValueError: ``path: ...``: it ends before its end is marked, is broken in the middle, or
            compressed; a label's member is none; a sample has several images.
    """
    last, sample = "", Sample("")
    try:
        with opened(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else it remembers them all
                folder, name = os.path.split(member.name)
                stem, _, part = name.partition(".")
                if not member.isreg() or not stem or name.startswith("__"):
                    continue
                key = os.path.join(folder, stem)
                if key != last:
                    if last:
                        yield sample
                    last, sample = key, Sample(key)
                _add(sample, path, member, part.lower(), archive, skip)
            if last:
                yield sample
            file.seek(archive.offset)
            end = file.read(tarfile.BLOCKSIZE)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(
            f"path: {path} is no whole tar file, or a compressed one: {error}"
        ) from None
    if end != bytes(tarfile.BLOCKSIZE):
        what = "broken" if len(end) == tarfile.BLOCKSIZE else "truncated"
        raise ValueError(f"path: {path} is {what} at byte {archive.offset}")


def _add(
    sample: Sample,
    path: str,
    member: tarfile.TarInfo,
    part: str,
    archive: tarfile.TarFile,
    skip: bool,
) -> None:
    ending = part.rpartition(".")[2]
    if f".{ending}" in ImageFolder.EXTENSIONS:
        if sample.offset >= 0:
            raise ValueError(
                f"path: {path}: {sample.name} and {member.name} are images of one sample"
            )
        if member.issparse():
            raise ValueError(f"path: {path}: {member.name} is a sparse file")
        sample.name, sample.offset, sample.size = member.name, member.offset_data, member.size
    elif ending in ("cls", "json"):
        file = archive.extractfile(member)
        assert file is not None
        read = _class if ending == "cls" else _integers
        try:
            sample.numbers |= read(f"path: {path}: {member.name}", file.read(_LONGEST))
        except ValueError as error:
            if not skip:
                raise ValueError(f"{error}; data.on_bad: skip leaves such images out") from None


def _class(where: str, content: bytes) -> dict[str, int]:
    try:
        number = int(content)
    except ValueError:
        raise ValueError(f"{where} holds {content[:100]!r}, no integer") from None
    return {"cls": _checked(where, number)}


def _integers(where: str, content: bytes) -> dict[str, int]:
    """Of a JSON object those values that are integers."""
    try:
        found: Any = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds no JSON object")
    return {key: _checked(where, value) for key, value in found.items() if type(value) is int}


def _checked(where: str, number: int) -> int:
    if not -_INT64 <= number < _INT64:
        raise ValueError(f"{where} holds an integer of more than 64 bits")
    return number
