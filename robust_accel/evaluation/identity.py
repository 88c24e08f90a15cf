"""What a measurement is of: digests of the function measured, and of the images and labels."""

import functools
import hashlib
import inspect
import json
import logging
import re
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robust_accel.attack_context import attack_context
from robust_accel.data import ImageSet
from robust_accel.evaluation.outcomes import global_state_kept
from robust_accel.models import PixelClassifier
from robust_accel.provenance import raw_bytes
from robust_accel.robust_model import ROBUST

# code whose version is part of every identity, or that is Python's own: named, not read
_VERSIONED = {"robust_accel", "torch", "timm", "torchvision", "transformers", "numpy", "builtins"}
_VERSIONED |= sys.stdlib_module_names
_OWN = set(vars(nn.Module())) | {"call_super_init", "dump_patches"}  # of nn.Module itself
# what says nothing of an answer: where a model is from, how it is trained and run
_WORDS = {"class_names", "statistics_source", "weights_source", "model_args", "_frozen"}
_WORDS |= {"pretrained_cfg", "default_cfg", "_model_args", "pretrained_model_args"}
_WORDS |= {"_name_or_path", "name_or_path", "_compiled_call_impl", "_is_torch_compile"}
_WORDS |= {"_compile_kwargs"}  # Lightning leaves it on what torch.compile returns
_WORDS |= {ROBUST}
_DEEPEST, _MOST = 8, 20_000  # levels and objects that are looked at
_PROBES = 2

Part = tuple[str, str]
"""Where in a model something stands, and what it is."""
Seen = dict[int, tuple[str, Any]]
"""Objects by id, with the place where each was met first; held, so that no id is used again."""


def digest_of_json(value: Any) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of_function(classifier: PixelClassifier, shape: tuple[int, ...]) -> str:
    """SHA-256 of all that decides what a classifier answers, on [0, 1] pixels.

    Weights, buffers and other state bit for bit with their types; mean and std, the size that
    images are brought to; modules with all their attributes and hooks, in containers and closures
    too; functions by their source. What a forward pass changes each time is left out, and so is
    what says nothing of the answer: memory layout, device, compilation, modes, what is trained, and
    what ``make_robust`` has added.

    What this does not see (a library's objects that are opaque) ``answers`` may.

    Args:
        shape: Of an image, C, H, W.
    """
    _answer(classifier, shape)  # what a first pass makes (caches) is there from here on
    before = dict(_parts(classifier))
    _answer(classifier, shape)
    steady = {where: what for where, what in _parts(classifier) if before.get(where) == what}
    digest = hashlib.sha256()
    for where, what in [*steady.items(), *_state(classifier)]:
        digest.update(f"{where}\0{what}\0".encode())
    return digest.hexdigest()


def digest_of_object(value: Any) -> str:
    """SHA-256 of what an object is and holds, as of a function's parts, and of all their classes.

    Of a model, which is asked for its answers as well, it is the modules' classes alone.
    """
    seen: Seen = {}
    parts = list(_describe(value, "", seen, 0))
    kinds = {_kind(type(held)): type(held) for _, held in list(seen.values())}
    for name, kind in sorted(kinds.items()):
        if not _is_versioned(kind):
            parts += _describe(kind, name, seen, 0)
    return digest_of_json(parts)


@torch.no_grad()
def answers(classifier: PixelClassifier, shape: tuple[int, ...]) -> list[list[float]]:
    """Logits of a few images of noise, always the same ones."""
    return _answer(classifier, shape).double().cpu().tolist()


def same_answers(one: list[list[float]], other: list[list[float]]) -> bool:
    """Whether two functions agree there, up to what another processor rounds otherwise."""
    a, b = np.asarray(one), np.asarray(other)
    if a.shape != b.shape:
        return False
    scale = max(float(np.nan_to_num(np.abs(a), posinf=0).max()), 1e-6)
    return bool(np.allclose(a, b, rtol=0, atol=0.01 * scale, equal_nan=True))


@torch.no_grad()
def _answer(classifier: PixelClassifier, shape: tuple[int, ...]) -> Tensor:
    noise = torch.rand(_PROBES, *shape, generator=torch.Generator().manual_seed(0))
    with attack_context(classifier, "eval"), global_state_kept(0):
        return classifier(noise.to(classifier.mean.device))


def _state(classifier: PixelClassifier) -> Iterator[Part]:
    """Weights, buffers and further state; of what is tied, where it was first."""
    named: dict[str, Any] = {
        **classifier.state_dict(),
        **dict(classifier.named_buffers(remove_duplicate=False)),
        **dict(classifier.named_parameters(remove_duplicate=False)),
    }
    first: dict[Any, str] = {}
    for name, value in sorted(named.items()):
        name = _plain_name(name)
        key: Any = id(value)
        if isinstance(value, Tensor) and value.layout == torch.strided and value.numel():
            key = (value.data_ptr(), value.shape, value.dtype)
        if first.setdefault(key, name) != name:
            yield name, f"as {first[key]}"
        else:
            yield name, "".join(what for _, what in _describe(value, name, {}, 0))


def _parts(classifier: PixelClassifier) -> Iterator[Part]:
    """Modules by their places, with what they hold beside weights, buffers and modules."""
    first: dict[int, str] = {}
    seen: Seen = {}
    for name, module in classifier.named_modules(remove_duplicate=False):
        if type(module).__name__ == "OptimizedModule":  # torch.compile's, around the same
            continue
        name = _plain_name(name)
        if first.setdefault(id(module), name) != name:
            yield name, f"as {first[id(module)]}"
            continue
        yield from _module(module, name, seen, 0)


def _module(module: nn.Module, name: str, seen: Seen, depth: int) -> Iterator[Part]:
    yield name, _without_addresses(module.extra_repr())
    yield f"{name}()", str(getattr(module, "code", ""))  # of what torch.fx has traced
    cls = getattr(type(module), "_class_before", type(module))  # make_robust has put one in front
    yield from _describe(cls, f"{name}:class", seen, depth)
    for key, value in sorted(vars(module).items()):
        if key not in _OWN and key not in _WORDS:
            yield from _describe(value, f"{name}.{key}", seen, depth + 1)
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(module, kind).values()
        # this package's own look on: ``Witness``
        others = [hook for hook in hooks if not type(hook).__module__.startswith("robust_accel.")]
        for number, hook in enumerate(others):
            yield from _describe(hook, f"{name}.{kind}.{number}", seen, depth + 1)


def _describe(value: Any, where: str, seen: Seen, depth: int) -> Iterator[Part]:
    """What a value is, with all that it holds."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield where, _without_addresses(repr(value))
        return
    if isinstance(value, torch.device):
        value = torch.device("cpu")  # wherever it is: the answer is the same
    if isinstance(value, torch.dtype | torch.device | np.generic | range):
        yield where, _without_addresses(repr(value))
        return
    if isinstance(value, Tensor):
        content = hashlib.sha256(raw_bytes(value)).hexdigest()
        yield where, f"{value.dtype} {list(value.shape)} {content}"
        return
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(value.tobytes()).hexdigest()
        yield where, f"{value.dtype} {list(value.shape)} {content}"
        return
    # one tuple in two places is as good as two; of an object that may hold state it is not
    is_plain = isinstance(value, tuple | list | dict | set | frozenset)
    if depth > _DEEPEST or len(seen) > _MOST or (not is_plain and id(value) in seen):
        yield where, f"as {seen.get(id(value), ('something far', None))[0]}"
        return
    seen[id(value)] = (where, value)
    yield where, _kind(value)
    for key, held in _held(value):
        yield from _describe(held, f"{where}.{key}", seen, depth + 1)
    if isinstance(value, nn.Module):
        state = [*value.named_parameters(), *value.named_buffers()]
        for key, held in state if depth else ():
            yield from _describe(held, f"{where}.{key}", seen, depth + 1)
        for key, module in value.named_modules():
            yield from _module(module, f"{where}.{key}", seen, depth + 1)


def _held(value: Any) -> Iterable[tuple[Any, Any]]:
    """What a container, a function, a class or an object holds."""
    if isinstance(value, dict):
        return sorted(value.items(), key=lambda item: repr(item[0]))
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if isinstance(value, set | frozenset):
        return list(enumerate(sorted(value, key=repr)))
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, types.MethodType):
        return [("func", value.__func__), ("self", value.__self__)]
    if isinstance(value, staticmethod | classmethod):
        return [("func", value.__func__)]
    if isinstance(value, property):
        return [("func", value.fget)]
    if isinstance(value, types.FunctionType):
        return [] if _is_versioned(value) else _held_by_function(value)
    if isinstance(value, type):
        if _is_versioned(value):
            # the name tells one that somebody has put in another's place
            forward = getattr(value, "forward", None)
            return [] if forward is None else [("forward", forward)]
        bases = [("bases", value.__bases__)]
        return bases + [i for i in sorted(vars(value).items()) if _is_written(value, *i)]
    if isinstance(value, nn.Module | types.ModuleType | types.BuiltinFunctionType | logging.Logger):
        return []
    held = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in _WORDS}
    for cls in type(value).__mro__:
        if not _is_versioned(cls):
            slots = [k for k, v in vars(cls).items() if isinstance(v, types.MemberDescriptorType)]
            held |= {k: getattr(value, k) for k in slots if hasattr(value, k)}
    return sorted(held.items(), key=lambda item: str(item[0]))


def _is_written(cls: type, name: str, value: Any) -> bool:
    """Whether an attribute of a class is somebody's, not Python's or made by ``dataclass``."""
    if not name.startswith("__"):
        return True
    if name == "__init__" and issubclass(cls, nn.Module):
        return False  # what it has made is looked at
    function = inspect.unwrap(getattr(value, "__func__", value))
    if not isinstance(function, types.FunctionType) or _is_versioned(function):
        return False
    return not (is_dataclass(cls) and function.__code__.co_filename == "<string>")


def _held_by_function(function: types.FunctionType) -> list[tuple[Any, Any]]:
    """Its defaults, what it closes over, and the globals that it names."""
    held: list[tuple[Any, Any]] = [("defaults", function.__defaults__)]
    held.append(("keywords", function.__kwdefaults__))
    names = list(_names(function.__code__))
    known = function.__globals__
    held += [(name, known[name]) for name in names if name in known]
    free = function.__code__.co_freevars
    for name, cell in zip(free, function.__closure__ or (), strict=True):
        try:
            held.append((name, cell.cell_contents))
        except ValueError:  # of a function that is being defined
            continue
    return held


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _kind(value: Any) -> str:
    """The name of a value's kind; of a function its source, or its bytecode where that has no file
    (a notebook's cell)."""
    if isinstance(value, types.FunctionType):
        name = f"{value.__module__}.{value.__qualname__}"
        return name if _is_versioned(value) else f"{name}\n{_source(value)}"
    if isinstance(value, type | types.BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, types.ModuleType):
        return value.__name__
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def _source(function: types.FunctionType) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return _bytecode(function.__code__)


def _bytecode(code: types.CodeType) -> str:
    constants = [
        _bytecode(c)
        if isinstance(c, types.CodeType)
        else repr(sorted(c, key=repr) if isinstance(c, frozenset) else c)
        for c in code.co_consts
    ]
    return repr([code.co_code, code.co_names, code.co_varnames, constants])


def _is_versioned(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).split(".")[0] in _VERSIONED


def _plain_name(name: str) -> str:
    """Without what torch.compile puts into names."""
    return re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", name)


def _without_addresses(text: str) -> str:
    """Text without addresses and device numbers, which differ from process to process."""
    return re.sub(r"0x[0-9a-f]+|(?<=cuda):\d+", "", text)


def digests_of_images(images: ImageSet, indices: list[Tensor]) -> list[bytes]:
    """SHA-256 of each image's pixels as they reach the classifier, its shape and its label."""
    found = []
    for x, labels in images.batches(indices, torch.device("cpu")):  # devices divide differently
        for pixels, label in zip(x, labels.tolist(), strict=True):
            about = f"{list(pixels.shape)} {pixels.dtype} {label}\0".encode()
            found.append(hashlib.sha256(about + raw_bytes(pixels)).digest())
    return found


def facts_of(classifier: PixelClassifier, name: str) -> dict[str, Any]:
    """What a report says of the model that it is about."""
    model = classifier.model
    cfg = getattr(model, "pretrained_cfg", None) or {}
    weight = next(model.parameters(), None)
    return {
        "name": name,
        "architecture": str(cfg.get("architecture") or type(model).__name__),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "class_names": classifier.class_names,
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
        "size": None if classifier.size is None else list(classifier.size),
        "statistics": classifier.statistics_source,
        "dtype": None if weight is None else str(weight.dtype).removeprefix("torch."),
    }
