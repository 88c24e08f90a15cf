"""WebDataset's shards, of real images: scikit-learn's digits."""

import functools
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    found = load_digits()
    return (found.images * 15).astype(np.uint8), found.target


def digit(number: int, size: int = 8) -> Image.Image:
    """A digit that somebody wrote."""
    return Image.fromarray(_digits()[0][number]).resize((size, size))


def label(number: int) -> int:
    return int(_digits()[1][number])


def write_shard(
    path: Path,
    numbers: Iterable[int] = range(8),
    *,
    kind: str = "cls",
    size: int = 8,
    mode: str = "w",
    **changed: bytes | None,
) -> list[int]:
    """Samples of a digit and its class each.

    Args:
        kind: Of label: ``cls``, or ``json``.
        changed: What a member has instead, None for no member: ``png3``, ``cls3`` by the number.

    Returns:
        Where in the file each member starts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = []
    with tarfile.open(path, mode) as archive:
        for number in numbers:
            file = io.BytesIO()
            digit(number, size).save(file, "PNG")
            about = str(label(number))
            if kind == "json":
                about = json.dumps({"label": label(number), "who": "somebody"})
            for ending, content in (("png", file.getvalue()), (kind, about.encode())):
                found = changed.get(f"{ending}{number}", content)
                if found is not None:
                    member = tarfile.TarInfo(f"{number:04}.{ending}")
                    member.size = len(found)
                    starts.append(archive.offset)
                    archive.addfile(member, io.BytesIO(found))
    return starts
