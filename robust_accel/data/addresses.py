"""Where data may lie, if not in a local file or on the hub by its name."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import config
from huggingface_hub import DatasetCard

from robust_accel.plain_yaml import read_plain

_AWAY = ("hf", "http", "https", "s3", "gs", "gcs", "az", "abfs")


class AddressError(ValueError):
    """Data that are not read from there."""


def check_address(path: str) -> None:
    """Refuse an address that does not lead to a file elsewhere; all that is none is let pass.

    What others can do, a chain (``zip://a::b``) or another name for a local file (``file://``),
    would be opened unseen, where a pipe is waited for without end.

    Raises:
        AddressError: ``path: ...``.
    """
    scheme, is_address, _ = path.partition("://")
    if "::" in path or (is_address and scheme not in _AWAY):
        allowed = ", ".join(f"{name}://" for name in _AWAY)
        raise AddressError(
            f"path: {path!r} is not read here: allowed are local paths, and {allowed}"
        )


def check_card(folder: str) -> None:
    """Refuse a data folder whose card names data outside of it, before anything is looked for.

    The card is the YAML of its ``README.md``, and ``.huggingface.yaml``: a stranger's, like the
    data.

    Raises:
        AddressError: ``path: ...``.
    """
    own, more = Path(folder, config.REPOCARD_FILENAME), Path(folder, config.REPOYAML_FILENAME)
    for path in (own, more):
        if path.exists() and not path.is_file():
            raise AddressError(f"path: {path} is no file")
    found = [DatasetCard.load(own).data.to_dict()] if own.exists() else []
    if more.exists():
        found.append(read_plain(more))
    for name in _named(found, False):
        if "://" in name or "::" in name or os.path.isabs(name) or ".." in Path(name).parts:
            raise AddressError(
                f"path: the card of {folder} names data at {name!r}: allowed are files in it"
            )


def _named(tree: Any, wanted: bool) -> Iterator[str]:
    """All texts below ``data_files`` and ``data_dir``."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _named(value, wanted or key in ("data_files", "data_dir"))
    elif isinstance(tree, list):
        for value in tree:
            yield from _named(value, wanted)
    elif wanted and isinstance(tree, str):
        yield tree


def check_found(path: str, name: str) -> None:
    """Refuse a file of a data set that lies elsewhere than the data set itself.

    Args:
        path: A local folder, or the name of a hub's data set.

    Raises:
        AddressError: ``path: ...``.
    """
    root = os.path.abspath(path)
    inside = Path(os.path.realpath(name)).is_relative_to(os.path.realpath(root))
    named = Path(os.path.abspath(name)).is_relative_to(root)  # maybe a link of the user's
    if not ("://" in name or (os.path.exists(path) and (inside or named))):
        raise AddressError(f"path: {path} names {name!r}, which is no part of it")
