"""Whole checkpoints on disk: a manifest tells them from what a fault has left of one."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from robust_accel.evaluation.identity import digest_of_json
from robust_accel.files import on_disk, read_json, write_json

MANIFEST = "manifest.json"
_REPLACED = "replaced-"
Manifest = dict[str, Any]
"""``about``, ``files``: size and SHA-256 by name, ``digest``: of these two."""


class _File(BaseModel):
    size: int
    sha256: str


class _Engine(BaseModel):
    engine: str
    zero_stage: int | None
    num_processes: int
    device: str


class _About(BaseModel):
    settings: dict[str, Any]
    data: dict[str, dict[str, int | str | dict[str, str]]]
    engine: _Engine
    versions: dict[str, str]
    step: int


class _Shape(BaseModel):
    """What a manifest must have: the folder may be a stranger's."""

    about: _About
    files: dict[str, _File]
    digest: str


def publish(folder: Path, target: Path, names: Iterable[str], about: dict[str, Any]) -> None:
    """Give a folder its manifest, then its name, with everything on disk before the name is.

    Args:
        folder: Beside ``target``, which it replaces if that is there.
        names: The files that it must hold, as paths inside of it.
        about: What it says of itself, plain values.
    """
    found = {name: _size_and_digest(folder / name) for name in sorted(names)}
    for path in {folder / name for name in found} | {p for p in folder.rglob("*") if p.is_dir()}:
        on_disk(path)
    content = {"about": json.loads(json.dumps(about)), "files": found}
    write_json(folder / MANIFEST, content | {"digest": digest_of_json(content)})
    replaced = target.with_name(f"{_REPLACED}{target.name}")
    if target.exists():
        target.rename(replaced)
    folder.rename(target)
    on_disk(target.parent)
    if replaced.exists():
        discard(replaced)


def restore_replaced(checkpoints: Path) -> None:
    """Undo what a process that was killed while it published had begun."""
    for replaced in checkpoints.glob(f"{_REPLACED}*"):
        target = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if target.exists():
            discard(replaced)
        else:
            replaced.rename(target)


def discard(folder: Path) -> None:
    """Remove a folder; one that is half removed has not its name any more."""
    shutil.rmtree(folder.rename(folder.with_name(f"incomplete-{folder.name}-removed")))


def read_whole(folder: Path) -> Manifest:
    """The manifest of a folder whose files are all what they were.

    Raises:
        ValueError: Which of them is not, or the manifest.
    """
    try:
        return _read_whole(folder)
    except OSError as error:  # a disk that is going bad, or what others may not read
        name = Path(error.filename or folder / MANIFEST).name
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error


def _read_whole(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{MANIFEST} is missing")
    try:
        manifest = read_json(path)
        _Shape(**manifest)
        digest = manifest.pop("digest")
    except (ValueError, TypeError):
        raise ValueError(f"{MANIFEST} is damaged") from None
    if digest_of_json(manifest) != digest:
        raise ValueError(f"{MANIFEST} is damaged")
    for name, known in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != known["size"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes of {known['size']}")
        if _size_and_digest(path) != known:
            raise ValueError(f"{name} is not what was written")
    return manifest | {"digest": digest}


def digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _size_and_digest(path: Path) -> dict[str, int | str]:
    return {"size": path.stat().st_size, "sha256": digest_of_file(path)}
