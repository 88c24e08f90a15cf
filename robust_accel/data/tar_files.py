"""Archives in WebDataset's form: what of them ``datasets`` would leave out without a word."""

import os
import tarfile
from typing import IO

_COMPARED = 5  # samples, from which `datasets` takes an archive's columns


def check_tar(path: str) -> None:
    """Look at the members of an archive, without reading its images.

    Raises:
        ValueError: ``path: ...``: it ends before its end is marked or is broken in the middle,
            where ``datasets`` takes what comes before for all; a ``.cls`` is no integer; the first
            samples have different parts.
    """
    parts: dict[str, set[str]] = {}  # of the first samples, by key
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                folder, name = os.path.split(member.name)
                key, _, part = name.partition(".")
                if not member.isreg() or not key or name.startswith("__"):
                    continue
                if len(parts) < _COMPARED or f"{folder}/{key}" in parts:
                    parts.setdefault(f"{folder}/{key}", set()).add(part.lower())
                if part.split(".")[-1].lower() == "cls":
                    _check_class(path, member.name, archive.extractfile(member))
                archive.members = []  # type: ignore[attr-defined]  # else it remembers them all
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            end = archive.fileobj.read(tarfile.BLOCKSIZE)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"path: {path} is no whole tar file: {error}") from None
    if end != bytes(tarfile.BLOCKSIZE):
        what = "broken" if len(end) == tarfile.BLOCKSIZE else "truncated"
        raise ValueError(f"path: {path} is {what} at byte {archive.offset}")
    first = next(iter(parts), "")
    for key, own in parts.items():
        if own != parts[first]:
            raise ValueError(
                f"path: {path}: sample {key.lstrip('/')} has {sorted(own)}, sample "
                f"{first.lstrip('/')} {sorted(parts[first])}"
            )


def _check_class(path: str, name: str, file: IO[bytes] | None) -> None:
    assert file is not None
    content = file.read(100)
    try:
        int(content)
    except ValueError:
        raise ValueError(f"path: {path}: {name} holds {content!r}, no integer") from None
