"""Room for checkpoints: asked for before training, and said in one sentence when it is used up."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from robust_accel.exit_codes import OF_THE_DISK, Unwritable
from robust_accel.messages import shown
from robust_accel.run_folder import RunFolder

_LONGEST_PATH, _INSIDE = 4096, 512  # bytes that Linux has room for, and of the names in it


def check_output(folder: RunFolder) -> None:
    """Refuse an output folder that would not hold all that a run writes, or not inside of it.

    Raises:
        ValueError: ``output: ...``
    """
    folder.check_contained()
    check_writable(folder.path)


def check_writable(path: Path, key: str = "output") -> None:
    """Refuse a folder that cannot be made or written, before anything is spent.

    Args:
        key: What names it.

    Raises:
        ValueError: ``key: ...``: it is a link to nothing, lies under a file, is read-only, has
            too long a path for the files in it, or the disk is full.
    """
    longest, length = _LONGEST_PATH - _INSIDE, len(os.fsencode(path))
    if length > longest:
        raise ValueError(
            f"{key}: {shown(str(path))} is too long a path for what a run writes into it: "
            f"{length:,} bytes, allowed are {longest:,}"
        )
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise ValueError(
                f"{key}: {place} is a link to {os.readlink(place)}, which is not there: make that "
                "folder, or choose another"
            )
        if place.exists():
            break
    if not place.is_dir():
        raise ValueError(f"{key}: {place} is no folder, so {path} cannot be made: choose another")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise ValueError(f"{key}: {place} cannot be written: {error.strerror}") from error


def check_room(
    folder: RunFolder,
    model: nn.Module,
    optimizer: Optimizer,
    averaged: nn.Module | None,
    others: int = 0,
) -> str | None:
    """What is to be said of the room for checkpoints before training; None where there is plenty.

    A checkpoint is about the weights, what the optimizer keeps of each, and the averaged ones.
    While one is written the one before is still there.

    Args:
        others: Bytes of what else is kept.

    Raises:
        ValueError: ``output: ...``: there is no room for two.
    """
    known = [size_of(path) for path in folder.steps()[-1:]]
    size = known[0] if known else _estimate(model, optimizer, averaged) + others
    needed = size * (2 - len(known))
    place = next(p for p in (folder.path, *folder.path.resolve().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    numbers = f"a checkpoint takes about {in_bytes(size)}, and {in_bytes(free)} are free at {place}"
    if free < needed:
        raise ValueError(f"output: no room for two checkpoints: {numbers}")
    return f"the disk is nearly full: {numbers}" if free < 2 * needed else None


@contextmanager
def told_when_full(folder: RunFolder) -> Iterator[None]:
    """Turn a failure to write into a run folder into a sentence; what was kept is there still.

    Raises:
        Unwritable: Which folder, why, what is free and from where the run can go on.
    """
    try:
        yield
    except Unwritable:
        raise
    except Exception as error:
        named = str(getattr(error, "filename", None) or "")
        inside = bool(named) and Path(named).is_relative_to(folder.path)
        if not folder.recipe.exists():
            if isinstance(error, FileNotFoundError) and inside:  # since the last look at it
                check_there(folder)
            raise
        # torch and safetensors have errors of their own, without the system's number
        free = shutil.disk_usage(folder.path).free
        if not (getattr(error, "errno", None) in OF_THE_DISK or inside or free < 2**20):
            raise
        reason = getattr(error, "strerror", None) or "no space left on the disk"
        kept = "".join(f"; {path} is kept, --resume goes on" for path in folder.steps()[-1:])
        raise Unwritable(
            f"{named or folder.path} cannot be written: {reason}, {in_bytes(free)} are free{kept}"
        ) from error


def check_there(folder: RunFolder) -> None:
    """Refuse to write into a run folder that was removed or unmounted since it was made.

    Raises:
        Unwritable: It was.
    """
    if not folder.recipe.exists():
        raise Unwritable(f"{folder.path} is gone: it was removed or unmounted during the run")


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def in_bytes(number: float) -> str:
    """``1.5 GB``: of 1,000 MB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        del units[0]
    return f"{number:.3g} {units[0]}"


def _estimate(model: nn.Module, optimizer: Optimizer, averaged: nn.Module | None) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    trained = sum(p.numel() * p.element_size() for g in optimizer.param_groups for p in g["params"])
    # Adam and its kin, LAMB among them, keep two numbers a weight, SGD a momentum
    kept = 2 if any("beta" in key for key in optimizer.defaults) else 1
    return weights * (1 + (averaged is not None)) + kept * trained
