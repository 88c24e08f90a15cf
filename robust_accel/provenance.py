"""What makes a number auditable: versions, hardware, and digests of tensors."""

import hashlib
import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

_PACKAGES = [
    "robust-accel", "torch", "torchvision", "accelerate", "timm", "transformers", "datasets",
    "pyautoattack", "deepspeed",
]  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {package: _version(package) for package in _PACKAGES}
    there = {package: number for package, number in found.items() if number is not None}
    return {"python": platform.python_version(), **there}


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def source_digest() -> str:
    """SHA-256 of this package's code: what is edited in place has the version that it had."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def hardware(device: torch.device) -> str:
    """The device's name in words, with the threads that a process uses where it is a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    number = torch.get_num_threads()
    return f"{name}, {number} thread{'s' * (number > 1)}"


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's own bytes, of whatever type it is."""
    tensor = tensor.detach().cpu()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def digest_of(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors' values, as fp32, one after another."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def equal_parameters(module: nn.Module, accelerator: Accelerator) -> bool:
    """Whether all processes have the same parameters."""
    return len(set(gather_object([digest_of(module.parameters())]))) == 1


def check_equal_weights(module: nn.Module, accelerator: Accelerator) -> None:
    """See that all processes hold the same parameters and buffers.

    Raises:
        ValueError: On all processes; which of them hold others than the first.
    """
    digests = gather_object([digest_of([*module.parameters(), *module.buffers()])])
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ValueError(
            f"processes {', '.join(others)} hold other weights than process 0: training has gone "
            "wrong, and nothing is measured; no model was saved, the checkpoints are still there"
        )
