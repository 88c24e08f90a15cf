"""Splits of a hub's data set, a folder, a parquet file, or scikit-learn's digits."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

DIGITS = "sklearn:digits"


def load_splits(path: str, config: str | None) -> datasets.DatasetDict:
    """All splits, each with the class names of its own files.

    Raises:
        ValueError: ``path: ...``: it cannot be loaded, or files of one split disagree on names.
    """
    try:
        if path == DIGITS:
            return _digits()
        if Path(path).suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=path)
        splits = datasets.load_dataset(path, config)
        files = _local_parquet(path, config) if Path(path).is_dir() else {}
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        local = "" if Path(path).exists() else " (no such local path, so the hub was asked)"
        raise ValueError(f"path: {path!r} cannot be loaded{local}: {error}") from error
    return _with_own_names(splits, files)


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


def _local_parquet(path: str, config: str | None) -> dict[str, list[str]]:
    """The files of each split, where they are parquet."""
    builder = datasets.load_dataset_builder(path, config)
    files = builder.config.data_files or {}
    found = {str(split): [str(name) for name in names] for split, names in files.items()}
    every = [name for names in found.values() for name in names]
    return found if all(Path(name).suffix == ".parquet" for name in every) else {}


def _with_own_names(
    splits: datasets.DatasetDict, files: dict[str, list[str]]
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
    own = {
        split: datasets.load_dataset("parquet", data_files={split: files[split]}, split=split)
        for split in of_split
    }
    return datasets.DatasetDict(splits | own)


def _class_names(file: str) -> dict[str, list[str]]:
    """The class names of each column of a parquet file that has some."""
    features = datasets.Features.from_arrow_schema(pq.read_schema(file))
    return {n: f.names for n, f in features.items() if isinstance(f, datasets.ClassLabel)}


def _digits() -> datasets.DatasetDict:
    """scikit-learn's digits as PIL images, every class split alike: 1437 train, 360 test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)  # 0 to 16 -> 0 to 255
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)}
    )
    parts = train_test_split(
        pixels, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    splits = {}
    for split, images, labels in (("train", parts[0], parts[2]), ("test", parts[1], parts[3])):
        rows = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
        splits[split] = datasets.Dataset.from_dict(rows, features=features)
    return datasets.DatasetDict(splits)
