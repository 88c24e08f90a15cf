"""Splits of a hub's data set, a folder, a file, or scikit-learn's digits."""

import logging
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from glob import has_magic
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.table import InMemoryTable
from filelock import FileLock

from robust_accel.data.addresses import AddressError, check_address, check_card, check_found
from robust_accel.data.classes import tell
from robust_accel.data.decoding import SKIP
from robust_accel.data.shards import SUFFIX, indexed, split_shards
from robust_accel.hub import asked_in_vain_once

DIGITS = "sklearn:digits"
_FILES = {".parquet": "parquet", ".arrow": "arrow"}  # and who reads them
_LONGEST = 400  # characters of another library's message


def load_splits(path: str, config: str | None, on_bad: str = "refuse") -> datasets.DatasetDict:
    """All splits, each with the class names of its own files.

    Args:
        on_bad: See ``DataSettings``.

    Raises:
        ValueError: ``path: ...``: it cannot be loaded, or files of one split disagree on names.
    """
    suffix = Path(path).suffix
    if config is not None and (path == DIGITS or suffix in (SUFFIX, *_FILES)):
        raise ValueError(f"config: {config!r} is one of a data set's, and {path} has none")
    if path == DIGITS:
        return _digits()
    check_address(path)
    if suffix == SUFFIX:
        return _of_shards(split_shards(path), on_bad)
    loader = _FILES.get(suffix)
    if loader is None and Path(path).is_file():
        raise ValueError(
            f"path: {path!r} is no file that is read here: allowed are {', '.join(_FILES)}, "
            f"{SUFFIX} (WebDataset), and folders"
        )
    if not (_is_here(path) or _may_be_elsewhere(path)):
        raise ValueError(f"path: {path!r} cannot be loaded: there is no such folder or file")
    if Path(path, datasets.config.DATASET_STATE_JSON_FILENAME).exists():
        raise ValueError(f"path: {path!r} was written by save_to_disk: write it by to_parquet")

    def builder() -> datasets.DatasetBuilder:
        if loader is None:
            return datasets.load_dataset_builder(path, config)
        return _of_files(loader, path)

    with _explained(path):
        if os.path.isdir(path):
            check_card(path)
        found: dict[str, list[str]] = builder().config.data_files or {}
    for name in (name for names in found.values() for name in names):
        check_address(name)
        if loader is None:
            check_found(path, name)
    if found and all(name.endswith(SUFFIX) for names in found.values() for name in names):
        return _of_shards({str(split): list(names) for split, names in found.items()}, on_bad)
    files = {str(split): [n for n in names if os.path.isfile(n)] for split, names in found.items()}
    every = [name for names in files.values() for name in names]
    if any(map(_is_image, every)) and (lost := _no_files(path)):
        text = f"{lost[0]} is a link to nothing, or no file"
        if on_bad != "skip":
            raise ValueError(f"path: {text}; {SKIP}")
        tell(f"{len(lost)} files of {path} are left out (data.on_bad: skip): {text}")
    with _explained(path):
        splits = _loaded(builder, every)
    are_parquet = all(Path(name).suffix == ".parquet" for name in every)
    return _with_own_names(path, splits, files) if are_parquet else splits


def rows_of(splits: datasets.DatasetDict, split: str, key: str, path: str) -> datasets.Dataset:
    """The rows of a split, which a setting ``key`` names.

    Raises:
        ValueError: There is no such split, or no image in it.
    """
    if split not in splits:
        raise ValueError(f"{key}: {path} has no split {split!r}; it has {list(splits)}")
    if len(splits[split]) == 0:
        raise ValueError(f"path: split {split} of {path} holds no image")
    return splits[split]


def _of_shards(splits: dict[str, list[str]], on_bad: str) -> datasets.DatasetDict:
    skip = on_bad == "skip"
    return datasets.DatasetDict({s: indexed(names, skip=skip) for s, names in splits.items()})


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in ImageFolder.EXTENSIONS


def _no_files(path: str) -> list[str]:
    """What has an image's name in a folder and is no file, so that ``datasets`` passes it over."""
    found, folders = [], [path]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif _is_image(entry.name) and not (entry.is_file() or entry.is_dir()):
                    found.append(entry.path)
    return sorted(found)


def _is_here(path: str) -> bool:
    """Whether it is a local file or folder, or a pattern of files' names."""
    is_pattern = Path(path).suffix in _FILES and has_magic(path) and "://" not in path
    return is_pattern or os.path.exists(path)


def _may_be_elsewhere(path: str) -> bool:
    """Whether it may be an address, or the name of a data set on the hub: ``OWNER/NAME``."""
    is_local = os.path.isabs(path) or path[0] == "." or path.count("/") > 1
    return "://" in path or not (is_local or Path(path).suffix in _FILES)


def _of_files(kind: str, files: str | dict[str, list[str]]) -> datasets.DatasetBuilder:
    """A reader of files, without the request by which ``datasets`` counts what reads a kind.

    It is about no data set of anybody's, and where names are not resolved it waits for seconds.
    """
    config, key = datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS"
    before = getattr(config, key)
    setattr(config, key, False)
    try:
        return datasets.load_dataset_builder(kind, data_files=files)
    finally:
        setattr(config, key, before)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Any error of ``datasets`` as one sentence with its cause, and with the file that it logs."""
    told: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            told.append(record.getMessage())
        return record.levelno < logging.ERROR

    handlers = list(logging.getLogger("datasets").handlers)
    for handler in handlers:
        handler.addFilter(keep)
    try:
        with nullcontext() if _is_here(path) else asked_in_vain_once():
            yield
    except AddressError:
        raise
    except Exception as error:  # its readers raise anything
        cause: BaseException = error
        while isinstance(cause, datasets.exceptions.DatasetGenerationError) and (
            inner := cause.__cause__ or cause.__context__
        ):
            cause = inner
        local = "" if _is_here(path) else " (no such local path, so the hub was asked)"
        where = next((f"{name}: " for name in _files_at_hand(cause)), "")
        text = told[-1] if told else f"{where}{type(cause).__name__}: {cause}"
        text = " ".join(text.split())
        text = text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
        raise ValueError(f"path: {path!r} cannot be loaded{local}: {text}") from error
    finally:
        for handler in handlers:
            handler.removeFilter(keep)


def _files_at_hand(error: BaseException) -> list[str]:
    """What the readers of ``datasets`` call ``file`` where they fail: they seldom name it."""
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    return [names["file"] for names in frames if isinstance(names.get("file"), str)]


# ---- the copies that datasets keeps ------------------------------------------------------------


def _loaded(
    builder: Callable[[], datasets.DatasetBuilder], files: list[str]
) -> datasets.DatasetDict:
    """All splits, from a copy that ``datasets`` keeps if it has the content of these files.

    By itself it tells files by their names and times of writing, which others can have, too.
    """
    own = builder()
    copy = Path(own.cache_dir)
    if not (files and copy.exists()):
        return _prepared(own)
    if not _is_older(copy, files):
        with suppress(OSError, ValueError):  # it is broken
            return _prepared(own)
    with FileLock(f"{copy}.lock"):
        if not _is_older(copy, files):
            with suppress(OSError, ValueError):  # another process may have made it anew
                return _prepared(builder())
        shutil.rmtree(copy)
        return _prepared(builder())


def _prepared(builder: datasets.DatasetBuilder) -> datasets.DatasetDict:
    builder.download_and_prepare()
    return builder.as_dataset()


def _is_older(copy: Path, files: list[str]) -> bool:
    """Whether a copy is older than what it was made of: not than images, whose paths it has."""
    read = [name for name in files if not _is_image(name)]
    made = copy / datasets.config.DATASET_INFO_FILENAME
    return made.exists() and any(os.stat(n).st_ctime > made.stat().st_mtime for n in read)


# ---- class names -------------------------------------------------------------------------------


def _with_own_names(
    path: str, splits: datasets.DatasetDict, files: dict[str, list[str]]
) -> datasets.DatasetDict:
    """Read anew where splits name classes differently: ``datasets`` gives all the first one's."""
    of_split: dict[str, dict[str, list[str]]] = {}
    for split, names in files.items():
        found = {name: named for name in names if (named := _class_names(name))}
        for name, named in found.items():
            first = next(iter(found))
            if named != found[first]:
                raise ValueError(
                    f"path: {first} and {name} are of one split and name classes differently: "
                    f"{found[first]} and {named}"
                )
            of_split[split] = named
    if all(named == next(iter(of_split.values())) for named in of_split.values()):
        return splits

    def alone(split: str) -> datasets.Dataset:
        own = {split: files[split]}
        return _loaded(lambda: _of_files("parquet", own), files[split])[split]

    with _explained(path):
        return datasets.DatasetDict(splits | {split: alone(split) for split in of_split})


def _class_names(file: str) -> dict[str, list[str]]:
    """The class names of each column of a parquet file that has some."""
    features = datasets.Features.from_arrow_schema(pq.read_schema(file))
    return {n: f.names for n, f in features.items() if isinstance(f, datasets.ClassLabel)}


def _digits() -> datasets.DatasetDict:
    """scikit-learn's digits as images, every class split alike: 1437 train, 360 test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # 0 to 16 -> 0 to 255
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    head = b"P5 8 8 255\n"  # of a PGM file, whose pixels follow as they are
    parts = train_test_split(
        pixels, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    splits = {}
    for split, images, labels in (("train", parts[0], parts[2]), ("test", parts[1], parts[3])):
        files = [{"bytes": head + image.tobytes(), "path": None} for image in images]
        rows = pa.table({"image": files, "label": labels}, schema=features.arrow_schema)
        splits[split] = datasets.Dataset(InMemoryTable(rows))
    return datasets.DatasetDict(splits)
