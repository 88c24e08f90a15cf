"""What makes a number auditable: versions, and a digest of the weights on every process."""

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

_PACKAGES = ("robust-accel", "torch", "accelerate", "timm", "datasets", "pyautoattack", "deepspeed")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors' values, as fp32, one after another."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def digest_of_parameters(module: nn.Module, accelerator: Accelerator) -> tuple[str, bool]:
    """SHA-256 of this process's parameters, and whether all processes have the same."""
    own = digest_of(module.parameters())
    return own, len(set(gather_object([own]))) == 1
