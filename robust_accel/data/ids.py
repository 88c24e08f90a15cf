"""A listed part of a split, by row number or by file name."""

import hashlib
import importlib.util
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from robust_accel.data.classes import shown
from robust_accel.files import read_text

Ids = str | Sequence[int] | None

IMAGENET5000 = "robustbench/imagenet5000"
"""RobustBench's 5000 ImageNet validation images, from the list in its Python package."""
# sha256 of the images' numbers in the order of RobustBench's list, one a line
_IMAGENET5000_DIGEST = "75bd138c7bf2638827eda29ccb03a921ae8d6526731d48ad8ef3b8c43a8cba62"
_LONGEST = 4096  # characters of a file's name
_IMAGENET_NAME = re.compile(r"ILSVRC2012_val_\d{8}")


class IdsError(ValueError):
    """``ids: ...``; the key is one of the recipe's section ``evaluate``."""

    section = "evaluate"


def list_text(ids: str | Sequence[int]) -> str:
    """In words which list it is, by the digest (SHA-256) of what it lists.

    Raises:
        IdsError: As ``find_rows``, where the list is not to be had.
    """
    if ids == IMAGENET5000:
        return f"ids of {ids}"
    lines = _lines(Path(ids)) if isinstance(ids, str) else [str(i) for i in ids]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    return f"{f'ids of {ids}' if isinstance(ids, str) else f'{len(ids)} listed ids'} ({digest})"


def find_rows(
    ids: str | Sequence[int], num_rows: int, paths: Callable[[], list[str | None]], where: str
) -> Tensor:
    """Row numbers of listed images, in the list's order.

    Args:
        ids: Row numbers; a text file of one image a line, a row number or a file name (with as
            much of its folders as tells it from others; ``#`` starts a comment); or
            ``robustbench/imagenet5000``.
        num_rows: Rows of the split, which is called ``where``.
        paths: Gives the file name of each row, if it has any.

    Raises:
        IdsError: ``ids: ...``: no such list, or images unknown or listed twice.
    """
    if not isinstance(ids, str):
        return _checked(list(ids), num_rows, [str(i) for i in ids], where)
    lines = _imagenet5000() if ids == IMAGENET5000 else _lines(Path(ids))
    are_numbers = [re.fullmatch(r"0|[1-9]\d*", line) is not None for line in lines]
    names = [line for line, is_number in zip(lines, are_numbers, strict=True) if not is_number]
    found = _FileNames(paths()).rows(names, where) if names else {}
    rows = [int(line) if n else found[line] for line, n in zip(lines, are_numbers, strict=True)]
    return _checked(rows, num_rows, lines, where)


def _checked(rows: list[int], num_rows: int, listed: list[str], where: str) -> Tensor:
    if not rows:
        raise IdsError("ids: the list is empty")
    outside = [row for row in rows if not 0 <= row < num_rows]
    if outside:
        raise IdsError(f"ids: {shown(outside)} are no rows of {where}: it has 0 to {num_rows - 1}")
    times = Counter(rows)
    twice = [name for row, name in zip(rows, listed, strict=True) if times[row] > 1]
    if twice:
        raise IdsError(f"ids: {shown(twice)} are listed more than once, or name one image")
    return torch.tensor(rows)


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.split("#")[0].strip() for line in read_text(path).splitlines()]
    except ValueError as error:
        raise IdsError(
            f"ids: {str(path)!r} is neither a readable text file nor {IMAGENET5000} ({error})"
        ) from None
    if any(len(line) > _LONGEST for line in lines):
        raise IdsError(f"ids: {path} has a line of more than {_LONGEST} characters: no list of ids")
    return [line for line in lines if line]


def _imagenet5000() -> list[str]:
    """The list of the installed ``robustbench`` package, of which nothing is executed."""
    spec = importlib.util.find_spec("robustbench")
    folders = (spec and spec.submodule_search_locations) or []
    name = "helper_files/imagenet_test_image_ids.txt"
    for folder in map(Path, folders):
        if (folder / name).exists():
            lines = _lines(folder / name)
            numbers = "\n".join(line[-13:-5] for line in lines)  # ..._val_00000293.JPEG
            if hashlib.sha256(numbers.encode()).hexdigest() != _IMAGENET5000_DIGEST:
                raise IdsError(f"ids: {folder / name} is not the list that {IMAGENET5000} means")
            return lines
    found = f"has no such file at {folders[0]}" if folders else "is not installed here"
    raise IdsError(
        f"ids: {IMAGENET5000} is {name} of the Python package robustbench, which {found}; the path "
        "of that file will do too"
    )


class _FileNames:
    """Which row has which file name, by as much of the path as both sides tell.

    ImageNet's validation images are known by their number, whatever folder they lie in and
    whatever is appended to their name.
    """

    def __init__(self, paths: Iterable[str | None]) -> None:
        # by name and by stem, which may itself have dots
        self._rows: dict[str, list[tuple[int, tuple[str, ...]]]] = defaultdict(list)
        for row, path in enumerate(paths):
            if path:
                name, stem, folders = _split(path)
                for key in {name, stem}:
                    self._rows[key].append((row, folders))

    def rows(self, names: Iterable[str], where: str) -> dict[str, int]:
        if not self._rows:
            raise IdsError(f"ids: the images of {where} have no file names: list row numbers")
        found = {name: self._matching(name) for name in names}
        unknown = [name for name, rows in found.items() if not rows]
        if unknown:
            raise IdsError(f"ids: {where} has no image {shown(unknown)}")
        several = [name for name, rows in found.items() if len(rows) > 1]
        if several:
            raise IdsError(
                f"ids: several images of {where} are named {shown(several)}: list them with their "
                "folders, or by row number"
            )
        return {name: rows[0] for name, rows in found.items()}

    def _matching(self, name: str) -> list[int]:
        whole, stem, folders = _split(name)

        def common(others: tuple[str, ...]) -> bool:
            known = min(len(folders), len(others))
            return folders[len(folders) - known :] == others[len(others) - known :]

        alike = self._rows.get(whole) or self._rows.get(stem, [])
        return [row for row, others in alike if common(others)]


def _split(path: str) -> tuple[str, str, tuple[str, ...]]:
    """A file's name, the same without its ending, and its folders."""
    pure = PurePosixPath(path.replace("\\", "/"))
    if match := _IMAGENET_NAME.match(pure.name):
        return match.group(), match.group(), ()
    return pure.name, pure.stem, pure.parts[:-1]
