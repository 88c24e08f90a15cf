"""WebDataset's shards: indexed once, then read at any place.

The index of a shard is a file in the cache of ``datasets``, which is mapped: a row an image, with
its name, its place in the shard and its label. So shards are rows like any others: shuffled whole,
dealt to processes, gone on with by the same code, and no process keeps more of them than a few
bytes an image.
"""

import glob
import hashlib
import http.client
import itertools
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from filelock import FileLock

from robust_accel.data.addresses import check_address
from robust_accel.data.tar_files import Sample, samples
from robust_accel.files import opened, remove_incomplete, written_whole

SUFFIX = ".tar"
PLACE = "__place__"
"""The column that says where an image lies: the shard, its state, and the bytes in it."""

_FOLDER = "robust_accel-shards"
_BATCH = 2**14  # samples that are written at a time
_BLOCK = 2**20  # bytes that are copied at a time
_PATIENCE = 60  # seconds without a byte
_MOST = 2**20  # names that braces may make
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


class ShardChanged(ValueError):
    """A shard is not what its index is of."""


# ---- which shards ------------------------------------------------------------------------------


def split_shards(path: str) -> dict[str, list[str]]:
    """The shards that a path means, by split.

    Args:
        path: Of a file, or a pattern: braces (``{000..146}``, ``{a,b}``), and of local files
            ``*``, ``?`` and ``[ab]``, too.

    Raises:
        ValueError: ``path: ...``: there is none, or one of those that braces name is missing.
    """
    names = [path] if os.path.lexists(path) else [n for p in _braces(path) for n in _found(p)]
    if missing := [name for name in names if "://" not in name and not os.path.exists(name)]:
        more = f" (and {len(missing) - 1} more of {len(names)})" if len(missing) > 1 else ""
        raise ValueError(f"path: there is no shard {missing[0]}{more}")
    if twice := len(names) - len(set(names)):
        raise ValueError(f"path: {path!r} names {twice} shards twice")
    if other := [name for name in names if not name.endswith(SUFFIX)]:
        raise ValueError(f"path: {other[0]} is no shard: {SUFFIX} is wanted")
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split(name), []).append(name)
    return splits


def _braces(pattern: str) -> list[str]:
    """``{000..146}`` and ``{a,b}`` written out, as a shell does."""
    parts: list[list[str]] = []
    for text, inside in re.findall(r"([^{}]*)(?:\{([^{}]*)\})?", pattern):
        parts.append([text])
        if inside:
            numbers = _RANGE.fullmatch(inside)
            if numbers is None:
                parts.append(inside.split(","))
                continue
            first, last = map(int, numbers.groups())
            if last - first >= _MOST:
                raise ValueError(f"path: {pattern!r} names more than {_MOST:,} shards")
            width = len(numbers[1])
            parts.append([f"{number:0{width}}" for number in range(first, last + 1)])
    if pattern.count("{") != pattern.count("}") or re.search(r"\{[^{}]*\{", pattern):
        raise ValueError(f"path: {pattern!r} has braces in braces, or such that do not close")
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def _found(pattern: str) -> list[str]:
    if not re.search(r"[*?[]", pattern):
        return [pattern]
    if "://" in pattern:
        raise ValueError(f"path: {pattern!r} cannot be listed: write the numbers, {{000..146}}")
    found = sorted(glob.glob(pattern))
    if not found:
        raise ValueError(f"path: there is no file like {pattern!r}")
    return found


def _split(name: str) -> str:
    """By a word in the file's name, or its folder's whole name; else train."""
    folder, file = os.path.split(name)
    words = re.split("[^a-z]+", file.lower())
    words.append(os.path.basename(folder).lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "train")


# ---- their index -------------------------------------------------------------------------------


def indexed(names: Sequence[str], *, skip: bool = False) -> datasets.Dataset:
    """The samples of shards as rows: ``image``, ``__place__``, and a column for each integer.

    Shards elsewhere are brought here first, once. The processes of a machine share that, and the
    indexing of what no earlier run has indexed.

    Args:
        skip: Samples whose label is none have no label, where a shard is indexed anew.

    Raises:
        ValueError: ``path: ...``: a shard is not as it must be, or has other columns than others.
    """
    for name in names:
        check_address(name)
    first = int(os.environ.get("LOCAL_RANK", "0")) * len(names)
    first //= max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    for name in [*names[first:], *names[:first]]:  # each process begins at another
        _index(name, skip)
    parts = [datasets.Dataset.from_file(str(_index(name, skip))) for name in names]
    for name, part in zip(names, parts, strict=True):
        if part.features != parts[0].features:
            own, other = (sorted({*p.features} - {PLACE}) for p in (part, parts[0]))
            raise ValueError(f"path: {name} has {own}, {names[0]} has {other}")
    return datasets.concatenate_datasets(parts)


def shards_of(rows: datasets.Dataset) -> dict[str, str]:
    """Digests of the names, sizes and labels in each shard, by its name; none of other rows."""
    if PLACE not in rows.features:
        return {}
    paths = [Path(file["filename"]) for file in rows.cache_files]
    return {path.parent.name.rpartition("-")[0]: path.stem.rpartition("-")[2] for path in paths}


def _index(name: str, skip: bool) -> Path:
    """The index of a shard, which is made where there is none of its state."""
    path = _brought(name) if "://" in name else name
    try:
        with opened(path) as file:
            about = os.fstat(file.fileno())
    except OSError as error:
        raise ValueError(f"path: {name} cannot be read: {error.strerror or error}") from None
    state, key = _state(about), hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    base = os.path.basename(name)[-100:]
    folder = Path(datasets.config.HF_DATASETS_CACHE, _FOLDER, f"{base}-{key[:20]}")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if known := sorted(folder.glob(f"{state}-*.arrow")):
            return known[0]
        remove_incomplete(folder)
        for other in folder.glob("*.arrow"):
            other.unlink()
        new = folder / "new.arrow"
        with written_whole(new) as place:
            digest = _write(place, path, name, state, skip)
        if _state(os.stat(path)) != state:
            raise ValueError(f"path: {name} has changed while it was read")
        return new.rename(folder / f"{state}-{digest}.arrow")


def _brought(name: str) -> str:
    """The file of a shard that lies elsewhere; brought here if it was not before."""
    if not name.startswith(("http://", "https://")):
        return str(datasets.DownloadManager().download(name))
    folder = Path(datasets.config.HF_DATASETS_CACHE, _FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:20]}{SUFFIX}"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            try:
                with (
                    urllib.request.urlopen(name, timeout=_PATIENCE) as source,
                    written_whole(path) as place,
                    open(place, "wb") as target,
                ):
                    shutil.copyfileobj(source, target, _BLOCK)
                    wanted = int(source.headers.get("Content-Length") or target.tell())
                    if target.tell() != wanted:
                        raise OSError(f"{target.tell()} of {wanted} bytes came")
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise ValueError(f"path: {name} cannot be brought here: {error}") from None
    return str(path)


def _write(place: Path, path: str, name: str, state: str, skip: bool) -> str:
    """Write an index, so many samples at a time; its digest."""
    digest, base, shard = hashlib.sha256(), os.path.basename(name), os.path.realpath(path)
    read = samples(path, skip=skip)
    first = list(itertools.islice(read, _BATCH))
    numbers = list(dict.fromkeys(key for sample in first for key in sample.numbers))
    if not first:
        raise ValueError(f"path: {name} holds no sample")
    where = {"shard": datasets.Value("string"), "state": datasets.Value("string")}
    where |= {"offset": datasets.Value("int64"), "size": datasets.Value("int64")}
    features: dict[str, Any] = {"image": datasets.Image(), PLACE: where}
    features |= {number: datasets.Value("int64") for number in numbers}
    schema = datasets.Features(features).arrow_schema
    with pa.OSFile(str(place), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in _batches(first, read):
            columns: dict[str, list[Any]] = {
                "image": [{"bytes": None, "path": f"{base}/{sample.name}"} for sample in batch],
                PLACE: [
                    {"shard": shard, "state": state, "offset": sample.offset, "size": sample.size}
                    for sample in batch
                ],
            }
            for number in numbers:
                columns[number] = [sample.numbers.get(number) for sample in batch]
            for sample in batch:
                digest.update(repr((sample.name, sample.size, sample.numbers)).encode())
            writer.write_table(pa.Table.from_pydict(columns, schema=schema))
    return digest.hexdigest()[:16]


def _batches(first: list[Sample], read: Iterator[Sample]) -> Iterator[list[Sample]]:
    while first:
        yield first
        first = list(itertools.islice(read, _BATCH))


def _state(about: os.stat_result) -> str:
    return f"{about.st_size}-{about.st_mtime_ns}"


# ---- their images ------------------------------------------------------------------------------


def read_place(place: Mapping[str, Any]) -> bytes | None:
    """The bytes of an image; None where the sample has none.

    Raises:
        ShardChanged: The shard is gone, or not what was indexed.
    """
    if place["offset"] < 0:
        return None
    try:
        with opened(place["shard"]) as file:
            if _state(os.fstat(file.fileno())) != place["state"]:
                raise ShardChanged(f"cannot be read: {place['shard']} has changed since the start")
            content = os.pread(file.fileno(), place["size"], place["offset"])
    except OSError as error:
        raise ShardChanged(f"cannot be read: {place['shard']}: {error.strerror}") from None
    return content


def changed(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which shards are others than they were, as the beginning of a sentence; empty if none is."""
    found = [f"{name} is missing" for name in was if name not in now]
    found += [f"{n} has other images or labels" for n in was if n in now and was[n] != now[n]]
    found += [f"{name} is new" for name in now if name not in was]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"shard {found[0]}{more}; " if found else ""
