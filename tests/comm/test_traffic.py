"""What a plan says is sent is what real processes send."""

import os
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist

from robust_accel import QSGD, AllReduce
from robust_accel.comm import Meter, Workers
from robust_accel.comm.base import run_all
from robust_accel.comm.layout import segment
from robust_accel.comm.traffic import Machines, traffic
from robust_accel.planning.estimate import PROTOCOLS

SHAPES = ((64, 3, 3, 3), (64,), (128, 64, 3, 3), (10, 128), (10,))
MORE = {
    "whole": QSGD(bits=8, block_size="whole"),
    "tensors": QSGD(bits=4, sides=1, block_size=None),
}
ALL = {**PROTOCOLS, **MORE}


def real(machines: int) -> dict[str, tuple[int, int]]:
    """Bytes sent, and inside machines, by each protocol on four workers."""
    os.environ["GROUP_RANK"] = str(dist.get_rank() * machines // dist.get_world_size())
    segments, position = [], 0
    for shape in SHAPES:
        segments.append(segment(shape, position))
        position += segments[-1].size
    workers, found = Workers.of(None, parent=None), {}
    for name, collective in ALL.items():
        if isinstance(collective, QSGD):
            collective = collective.model_copy(update={"compile": False})
        meter = Meter()
        run_all(collective.exchanges(torch.ones(position), segments, 0, workers, meter))
        found[name] = meter.bytes_sent, meter.bytes_inside_machine
    return found


def in_one_machine(*_: int) -> dict[str, tuple[int, int]]:
    return real(1)


def in_two_machines(*_: int) -> dict[str, tuple[int, int]]:
    return real(2)


@pytest.mark.launch
@pytest.mark.long
def test_bytes_are_those_that_real_workers_count(tmp_path: Path) -> None:
    (first, *_) = processes.run([in_one_machine, in_two_machines], 4, tmp_path)
    assert "error" not in first, first["error"]
    for name, collective in ALL.items():
        sent, _ = first["in_one_machine"][name]
        for machines in (Machines(1, 4), Machines(4, 1)):
            assert traffic(collective, SHAPES, machines).sent == sent
        sent, inside = first["in_two_machines"][name]
        found = traffic(collective, SHAPES, Machines(2, 2))
        assert found.sent == sent
        # a ring leaves a machine once; quantised parts leave it by each of its workers
        assert found.leaving == (sent - inside) * (2 if isinstance(collective, QSGD) else 1)
    assert not dist.is_initialized()


def test_one_machine_sends_nothing_and_more_workers_do_not_send_more() -> None:
    assert traffic(AllReduce(), SHAPES, Machines(1, 8)).leaving == 0
    large = ((2048, 1024),)  # beside 1,000 workers' blocks
    few, many = (traffic(QSGD(bits=8), large, Machines(n, 1)).sent for n in (10, 1000))
    assert few < many < 1.3 * few


def test_a_quantisers_arithmetic_is_timed_where_it_is_asked_for() -> None:
    eager = QSGD(bits=8, compile=False)
    assert traffic(eager, SHAPES, Machines(2, 1)).seconds == 0
    assert traffic(eager, SHAPES, Machines(2, 1), torch.device("cpu")).seconds > 0
