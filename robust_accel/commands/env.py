"""The env command: on what this runs, for reports of faults."""

import argparse
import os
import platform

import torch

from robust_accel.comm.workers import backends
from robust_accel.commands import say
from robust_accel.provenance import hardware, versions


def run(_: argparse.Namespace) -> int:
    """Print versions, devices, backends, and what of the environment bears on a run."""
    cuda = torch.cuda.is_available()
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if cuda else []
    about = versions() | {
        "system": platform.platform(),
        "processor": hardware(torch.device("cpu")),
        "GPUs": ", ".join(map(hardware, devices)) or "none",
        "CUDA": torch.version.cuda or "none",
        "bf16": "yes" if cuda and torch.cuda.is_bf16_supported() else "not on a GPU here",
        "backends": ", ".join(backends()),
    }
    named = sorted(n for n in os.environ if n.startswith(_BEARING) and "TOKEN" not in n)
    for name, value in (about | {name: os.environ[name] for name in named}).items():
        say(f"{name}: {value}")
    return 0


_BEARING = ("ACCELERATE_", "CUDA_", "GLOO_", "HF_", "NCCL_", "OMP_", "ROBUST_ACCEL_", "TORCH")
