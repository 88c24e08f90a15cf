"""What a measurement is of: digests of the function measured, and of the images and labels."""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from robust_accel.data import ImageSet
from robust_accel.models import PixelClassifier
from robust_accel.provenance import raw_bytes

# what versions tell already: only code that may change under one version is read
_VERSIONED = ("torch", "timm", "torchvision", "transformers", "collections")
_PLAIN = (bool, int, float, complex, str, torch.dtype, type(None))
_IGNORED = {"training", "call_super_init", "dump_patches"}  # of each module: modes are ours
_IGNORED |= {"class_names", "statistics_source", "weights_source"}  # words of a PixelClassifier


def digest_of_json(value: Any) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of_function(classifier: PixelClassifier) -> str:
    """SHA-256 of all that decides what a classifier answers, on [0, 1] pixels.

    Weights and buffers bit for bit with their types, mean and std, the size that images are brought
    to, the modules and their plain attributes (options that no weight shows), hooks, and the source
    of classes that no version tells. How it is laid out in memory, which device holds it, whether
    it is compiled and what it trains (frozen parameters, modes) are no part of it.
    """
    digest = hashlib.sha256()
    for part in _structure(classifier):
        digest.update(part.encode() + b"\0")
    tensors = [*classifier.named_parameters(), *classifier.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def _structure(classifier: PixelClassifier) -> Iterable[str]:
    yield str(classifier.size)
    sources: dict[type, str] = {}
    for name, module in classifier.named_modules():
        cls = type(module)
        yield f"{name}: {cls.__module__}.{cls.__qualname__} {_named(module.extra_repr())}"
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or key in _IGNORED:
                continue
            if _is_plain(value):
                yield f"{key}={value!r}"
            elif inspect.isfunction(value) or inspect.isbuiltin(value):
                yield f"{key}={value.__module__}.{value.__qualname__}"
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            yield f"hook {getattr(hook, '__qualname__', type(hook).__qualname__)}"
        if cls not in sources:
            sources[cls] = "".join(_source(c) for c in cls.__mro__)
            yield sources[cls]


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _named(text: str) -> str:
    """Text without addresses, which differ from process to process."""
    return re.sub(r"0x[0-9a-f]+", "", text)


def _source(cls: type) -> str:
    """A class's own source, or its bytecode where there is no file (a notebook's cell)."""
    if cls.__module__.split(".")[0] in (*_VERSIONED, "builtins", "typing"):
        return ""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        codes = [f.__code__ for f in vars(cls).values() if inspect.isfunction(f)]
        return repr([(c.co_code, _named(repr(c.co_consts)), c.co_names) for c in codes])


def digests_of_images(images: ImageSet, indices: list[Tensor], device: torch.device) -> list[bytes]:
    """SHA-256 of each image's pixels as they reach the classifier, its shape and its label."""
    found = []
    for x, labels in images.batches(indices, device):
        for pixels, label in zip(x.cpu(), labels.tolist(), strict=True):
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
