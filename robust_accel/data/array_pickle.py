"""Read arrays from a pickle that somebody else made, and execute nothing else."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

# What numpy's arrays are made of, by the names of its older and newer releases. None of these
# does more than to build an array, a type or a string of bytes.
_ALLOWED = {
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, not only arrays")
        return super().find_class(module, name)


def load_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays of a pickled dictionary, by name.

    Raises:
        ValueError: ``path: ...``: no such file, no such pickle, or anything but numeric arrays,
            numbers and text in it.
    """
    try:
        # latin1: arrays that Python 2 pickled
        content = _ArrayUnpickler(io.BytesIO(Path(path).read_bytes()), encoding="latin1").load()
    except OSError as error:
        raise ValueError(f"path: {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(f"path: {path} is refused: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"path: {path} must hold a dictionary, found {type(content).__name__}")
    arrays = {}
    for name, value in content.items():
        array = np.asarray(value)
        if array.dtype == object:
            raise ValueError(f"path: {path} is refused: {name!r} holds objects, not numbers")
        arrays[str(name)] = array
    return arrays
