"""What something takes of memory, in a process of its own."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

from robust_accel.training.metrics import peak_memory


def growth(work: Callable[[], object]) -> int:
    """Bytes that the peak of a fork grows by while it works."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(work, theirs))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return ours.recv()


def _measured(work: Callable[[], object], pipe: Any) -> None:
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    work()
    pipe.send(peak_memory(cpu) - before)
