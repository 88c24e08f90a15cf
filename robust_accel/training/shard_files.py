"""Shards on disk: torch's distributed checkpoints, of tensors alone, and without its pickle.

``.metadata`` of such a checkpoint is a pickle, and a run folder may be a stranger's: here it can
name nothing but what describes tensors.
"""

import dataclasses
import enum
import io
import pickle
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

_MOST_BYTES = 1 << 28  # of the description: some hundred for each piece


class _Description(pickle.Unpickler):
    """Builds torch's descriptions of tensors, and refuses everything else."""

    _OTHERS: ClassVar = {
        ("torch", "Size"): torch.Size,
        ("pathlib", "PosixPath"): PurePosixPath,  # where it was once written, which nothing needs
        ("pathlib", "WindowsPath"): PurePosixPath,
        ("pathlib._local", "PosixPath"): PurePosixPath,
        ("torch.serialization", "_get_layout"): getattr(torch.serialization, "_get_layout", None),
        (filesystem.__name__, "_StorageInfo"): getattr(filesystem, "_StorageInfo", None),
    }

    def find_class(self, module: str, name: str) -> Any:
        found = self._OTHERS.get((module, name))
        if module == metadata.__name__:
            described = getattr(metadata, name, None)
            is_plain = dataclasses.is_dataclass(described) or (
                isinstance(described, type) and issubclass(described, enum.Enum)
            )
            found = described if is_plain else None
        elif module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            raise pickle.UnpicklingError(f"it names {module[:100]}.{name[:100]}")
        return found


class ShardReader(dcp.FileSystemReader):
    """Reads what ``write_shards`` has written, or a sentence says why not."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """What is there, checked.

        Raises:
            ValueError: It is not about tensors in files of this folder alone.
        """
        path = self._folder / ".metadata"
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise pickle.UnpicklingError("it is too large")
            found = _Description(io.BytesIO(path.read_bytes())).load()
            self._check(found)
        except Exception as error:  # a pickle may be broken in many ways
            raise ValueError(f"{path}: cannot be read: {str(error)[:200]}") from error
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found

    def _check(self, found: Any) -> None:
        if not isinstance(found, metadata.Metadata):
            raise TypeError("it is no description of a checkpoint")
        for name, one in found.state_dict_metadata.items():
            if not (isinstance(name, str) and isinstance(one, metadata.TensorStorageMetadata)):
                raise TypeError(f"{str(name)[:100]} is no tensor")  # and would be unpickled
        names = {path.name for path in self._folder.iterdir()}
        for place in found.storage_data.values():
            if place.relative_path not in names or getattr(place, "transform_descriptors", None):
                raise ValueError(f"{str(place.relative_path)[:100]} is no file of it")

    def kinds(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and type of each tensor that is there."""
        described: Mapping[str, Any] = self.read_metadata().state_dict_metadata
        return {name: (one.size, one.properties.dtype) for name, one in described.items()}


def write_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors, of DTensors each process its pieces. Every process must call it."""
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder))


def read_shards(tensors: dict[str, Tensor], reader: ShardReader) -> None:
    """Read into tensors, in place, however they were cut. Every process must call it.

    Raises:
        ValueError: Of these tensors some are not there, or have another shape.
    """
    there = reader.kinds()
    for name, tensor in tensors.items():
        if name not in there or there[name][0] != tensor.shape:
            found = f"is of shape {tuple(there[name][0])}" if name in there else "is not there"
            raise ValueError(f"{reader.path}: {name} {found}, the model's is {tuple(tensor.shape)}")
    dcp.load(dict(tensors), storage_reader=reader)
