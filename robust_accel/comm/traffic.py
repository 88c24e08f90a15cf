"""What a protocol sends, on machines that are not there: it runs, and its messages go nowhere."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from robust_accel.comm.base import Collective, run_all
from robust_accel.comm.collectives import QSGD
from robust_accel.comm.layout import segment
from robust_accel.comm.meter import Meter
from robust_accel.comm.workers import Workers


@dataclass(frozen=True)
class Machines:
    """``nodes`` machines of ``per_node`` workers each."""

    nodes: int
    per_node: int

    @property
    def workers(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Traffic:
    """Of a step's gradient, by a protocol.

    Attributes:
        sent: Bytes that a worker sends.
        leaving: Bytes that leave a machine, by any of its workers.
        seconds: Of a worker's own arithmetic; 0 where it is not timed.
    """

    sent: int
    leaving: int
    seconds: float


def traffic(
    collective: Collective,
    shapes: Sequence[Sequence[int]],
    machines: Machines,
    timed_on: torch.device | None = None,
) -> Traffic:
    """Run a protocol on zeros, with process groups that carry nothing; its own meter counts.

    A ring of all workers leaves a machine by one of them; what only machines exchange, by all.

    Args:
        shapes: Of the trained parameters.
        timed_on: Where its arithmetic is timed; compiling it first takes some seconds.
    """
    segments, position = [], 0
    for shape in shapes:
        segments.append(segment(shape, position))
        position += segments[-1].size
    quantised = isinstance(collective, QSGD)
    if isinstance(collective, QSGD) and timed_on is None:
        collective = collective.model_copy(update={"compile": False})  # the same messages, sooner
    flat, seconds = torch.zeros(position, device=timed_on), 0.0
    with _nowhere(machines) as workers, torch.no_grad():
        for _ in range(1 if timed_on is None or not quantised else 3):
            meter, began = Meter(), time.perf_counter()
            run_all(collective.exchanges(flat, segments, 0, workers, meter))
            if timed_on is not None and timed_on.type == "cuda":
                torch.cuda.synchronize(timed_on)
            seconds = time.perf_counter() - began
        by_all = quantised and workers.node is not None
    leaving = meter.bytes_sent - meter.bytes_inside_machine
    leaving *= 0 if machines.nodes == 1 else machines.per_node if by_all else 1
    return Traffic(meter.bytes_sent, leaving, 0.0 if timed_on is None else seconds)


@contextmanager
def _nowhere(machines: Machines) -> Iterator[Workers]:
    """Groups of the first worker, as ``Workers.of`` would make them."""
    # of torch's tests, and what its trainers' dry runs use, too: nothing public does this
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a plan is made by one process, started without a launcher")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=machines.workers)
    try:
        made: dict[str, Any] = {}
        if machines.nodes > 1 and machines.per_node > 1:
            inside = range(machines.per_node)
            across = range(0, machines.workers, machines.per_node)
            made = {"node": dist.new_group([*inside]), "peers": dist.new_group([*across])}
        yield Workers(**made)
    finally:
        dist.destroy_process_group()
