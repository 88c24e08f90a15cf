"""Files of tensors that somebody else made: what they may hold is checked before it is used.

torch executes nothing of a pickle with ``weights_only``. But its reader crashes on tuples that are
nested too deeply, unpacks archives of any ratio, and rebuilds tensors of any size from a few bytes.
"""

import argparse
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from robust_accel.files import opened

_DEPTH = 50  # of tuples in tuples, where a checkpoint has two or three
_ITEMS = 10**6  # of a tuple, those of its tuples counted
_INSTRUCTIONS = 2**23  # of a pickle: some 60 a tensor
_PICKLES = 5  # of a file without an archive: three about the file, its content, its storages
_ARCHIVE = b"PK\x03\x04"  # how a file begins that torch takes for one
_TYPE = 200  # characters of a type's name
_TENSORS = (".safetensors", ".pkl", ".bin", ".pt", ".pth")  # files that a checkpoint may hold
_SMALL = 2**20  # elements of a tensor that may be repeated from fewer


def read_weights(path: Path) -> Any:
    """What a file of tensors holds: tensors, plain values, mappings and lists of them.

    Args:
        path: Safetensors, or a torch checkpoint.

    Raises:
        ValueError: It cannot be read, holds more than these, or claims more than it has.
    """
    check_readable(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # timm's own checkpoints hold their arguments: a namespace of plain values
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"cannot be read: {_more_than_tensors(path, error)}") from error
    except Exception as error:  # torch and safetensors have an error for each kind of damage
        raise ValueError(f"cannot be read: {_first_line(error)}") from error
    for name, tensor in _tensors(content):
        _check_plain(name, tensor)
    return content


def check_checkpoint(folder: Path) -> None:
    """Raise ValueError unless all of a checkpoint's files can be given to Accelerate.

    It lets numpy's arrays through, and bytes that are called objects would be pointers.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TENSORS:
            try:
                check_readable(path, arrays=True)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error


def check_readable(path: Path, *, arrays: bool = False) -> None:
    """Raise ValueError unless it is a file that torch or safetensors can be given.

    Args:
        arrays: Whether numpy's arrays are allowed in it, and so none of objects.
    """
    try:
        with opened(path) as file:
            if path.suffix != ".safetensors":
                _check_torch_file(file, path.stat().st_size, arrays)
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except Exception as error:  # a pickle and an archive may be broken in many ways
        raise ValueError(f"cannot be read: {_first_line(error)}") from error


def _check_torch_file(file: BufferedReader, size: int, arrays: bool) -> None:
    if file.peek(len(_ARCHIVE))[: len(_ARCHIVE)] != _ARCHIVE:
        for number in range(_PICKLES):
            if number == 0 or file.peek(1):
                _check_pickle(file, arrays)
        return
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("the archive is compressed, which torch's are not")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its parts are larger than the file")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                with archive.open(entry) as part:
                    _check_pickle(part, arrays)


def _check_pickle(file: Any, arrays: bool) -> None:
    """Follow a pickle's instructions without doing them; ValueError where its tuples explode.

    On the stack and in the memo is what a value would be as a tuple: (depth, items).
    """
    stack: list[tuple[int, int] | None] = []  # None: a mark
    memo: dict[Any, tuple[int, int] | None] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if number > _INSTRUCTIONS:
            raise ValueError(f"more than {_INSTRUCTIONS} instructions in its pickle")
        name, before, popped = opcode.name, opcode.stack_before, []
        if arrays and isinstance(argument, str) and _is_of_objects(argument):
            raise ValueError(f"it may hold arrays of {argument!r}, not of numbers")
        if name == "MARK":
            stack.append(None)
            continue
        count = len(before)
        if pickletools.markobject in before:
            while (top := stack.pop()) is not None:
                popped.append(top)
            count = before.index(pickletools.markobject)
        popped += [stack.pop() or (0, 1) for _ in range(count)]
        made: tuple[int, int] | None = (0, 1)
        if "TUPLE" in name:
            depths, items = zip((0, 0), *popped, strict=True)
            made = (1 + max(depths), 1 + sum(items))
            if made[0] > _DEPTH or made[1] > _ITEMS:
                raise ValueError("tuples in tuples without end")
        elif name in ("DUP", "MEMOIZE"):
            made = popped[0]
        elif name.endswith("GET"):
            made = memo[argument]
        if name == "MEMOIZE":
            memo[len(memo)] = made
        elif name.endswith("PUT"):
            memo[argument] = stack[-1]
        stack += [made] * len(opcode.stack_after)


def _is_of_objects(text: str) -> bool:
    """Whether numpy takes a text for a type of anything but numbers and text."""
    if not (text.isascii() and text.isprintable()):
        return False  # an array's bytes, as old protocols write them
    if len(text) > _TYPE:
        return "," in text  # a type of many parts
    try:
        return np.dtype(text).kind not in "biufcSUMm"
    except (TypeError, ValueError, SyntaxError):
        return False


def _tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors in mappings and lists, however deep, each container once."""
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", content)]
    while left:
        name, value = left.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            inside = value.items() if isinstance(value, Mapping) else enumerate(value)
            left += [(key if isinstance(key, str) else name, item) for key, item in inside]


def _check_plain(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a tensor's elements are numbers that lie in the file."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.is_quantized or tensor.is_nested or tensor.is_complex():
        raise ValueError(f"cannot be read: {name[:100]} is no plain tensor of real numbers")
    wanted, there = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if wanted > there and tensor.numel() > _SMALL:
        raise ValueError(f"cannot be read: {name[:100]} repeats {there} bytes {wanted} bytes long")


def _more_than_tensors(path: Path, error: Exception) -> str:
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no zip file, or none of torch
        unknown = []
    if not unknown:
        return _first_line(error)
    return (
        f"besides tensors it holds {', '.join(unknown)[:500]}, and a pickle may execute anything: "
        "where it can be trusted, load it there and save its state_dict()"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
