"""From what a worker's step takes and a protocol sends to the step of many machines."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from robust_accel.comm import QSGD, AllReduce, Collective
from robust_accel.comm.layout import segment
from robust_accel.comm.traffic import Machines, Traffic, traffic
from robust_accel.planning.cost import Cost

PROTOCOLS: Mapping[str, Collective] = {
    "fp32": AllReduce(),
    "fp16": AllReduce(dtype="fp16"),
    "8 bits, 1 side": QSGD(bits=8, sides=1),
    "8 bits, 2 sides": QSGD(bits=8, sides=2),
    "4 bits, 2 sides": QSGD(bits=4, sides=2),
}
BASELINE = "fp32"
PAYS = 1.05  # times as fast as fp32: less is not worth a setting


@dataclass(frozen=True)
class Device:
    """A published device.

    Attributes:
        flops: A second, by precision: dense, of its tensor cores where they have it.
        memory: Bytes.
    """

    flops: Mapping[str, float]
    memory: float


DEVICES = {
    "v100": Device({"fp32": 15.7e12, "bf16": 15.7e12, "fp16": 125e12}, 32 * 2**30),
    "a100": Device({"fp32": 156e12, "bf16": 312e12, "fp16": 312e12}, 80 * 2**30),
    "h100": Device({"fp32": 495e12, "bf16": 989e12, "fp16": 989e12}, 80 * 2**30),
}
"""NVIDIA's data sheets, SXM, without sparsity; fp32 as TF32 where there is one."""


@dataclass(frozen=True)
class Estimate:
    """A step by one protocol.

    Attributes:
        wire: Seconds that what leaves a machine takes on its link.
        exposed: Of these and the protocol's arithmetic what the backward cannot hide.
        step: Seconds of the whole step.
    """

    protocol: str
    traffic: Traffic
    wire: float
    exposed: float
    step: float


def estimates(
    cost: Cost,
    machines: Machines,
    rate: float,
    images: int,
    micro_batches: int,
    protocols: Mapping[str, Collective],
    timed_on: torch.device | None,
) -> list[Estimate]:
    """A step by each protocol.

    Micro-batches come one after another, and the last one's backward hides as much of the exchange
    as it lasts: on GPUs; a worker that has one core for both hides nothing. Latencies count
    nothing.

    Args:
        rate: Bytes a second that leave a machine.
        images: Of a worker in a micro-batch.
        timed_on: See ``traffic``.
    """
    forward, backward = cost.forward * images, cost.backward * images
    hidden = 0.0 if timed_on is not None and timed_on.type == "cpu" else backward
    found = []
    for name, collective in protocols.items():
        counted = traffic(collective, cost.shapes, machines, timed_on)
        wire = counted.leaving / rate
        exposed = max(0.0, wire + counted.seconds - hidden)
        step = micro_batches * (forward + backward) + exposed + cost.update
        found.append(Estimate(name, counted, wire, exposed, step))
    return found


@dataclass(frozen=True)
class Engine:
    """What holds weights, gradients and state.

    Attributes:
        memory: Bytes of a worker.
        leaving: Bytes of weights that leave a machine in a step; none where each worker has all.
    """

    name: str
    memory: float
    leaving: float = 0.0


def engines(
    cost: Cost, machines: Machines, images: int, micro_batches: int, gathered: float
) -> list[Engine]:
    """Weights, gradients, state, and what the backward needs.

    DDP has its gradients twice (its buckets). ZeRO 1 shares out the state, and has a copy of its
    share of the weights; ZeRO 2 the gradients as well. FSDP2 shares out all, and gathers the
    weights for each pass, or once a step (``train.keep_gathered``), round a ring of all workers; as
    HSDP it does so within each machine. What kernels, caches and the communication library take is
    not in it.

    Args:
        gathered: Bytes of all weights as they are gathered, see ``gathered_bytes``.
    """
    passing = cost.fixed + cost.kept * images
    rest = cost.average + passing
    kept = cost.state + cost.gradients + cost.weights

    def in_pieces(name: str, workers: int, gathers: int) -> Engine:
        pieces = cost.weights + (kept + cost.average) / workers + passing
        share = (workers - 1) / workers if workers > machines.per_node else 0.0
        return Engine(name, pieces, micro_batches * gathers * share * gathered)

    state, gradients, weights = (
        n / machines.workers for n in (cost.state, cost.gradients, cost.weights)
    )
    found = [
        Engine("DDP", cost.weights + 2 * cost.gradients + cost.state + rest),
        Engine("ZeRO 1", cost.weights + cost.gradients + state + weights + rest),
        Engine("ZeRO 2", cost.weights + gradients + state + weights + rest),
    ]
    if machines.nodes > 1 and machines.per_node > 1:
        found.append(in_pieces("HSDP", machines.per_node, cost.gathers))
    return [
        *found,
        in_pieces("FSDP2, keep_gathered", machines.workers, 1),
        in_pieces("FSDP2", machines.workers, cost.gathers),
    ]


def gathered_bytes(cost: Cost, collective: Collective, *, half: bool) -> float:
    """Of all weights as FSDP2 gathers them: in fp32 or half precision, or quantised."""
    quantizer = getattr(collective, "weight_quantizer", None)
    if quantizer is not None:
        return float(quantizer.num_bytes([segment(shape, 0) for shape in cost.shapes]))
    return cost.parameters * (2.0 if half else 4.0)


def at_speed(cost: Cost, flops: float) -> Cost:
    """The same work at so many operations a second; the update counts nothing then."""
    share = cost.backward / (cost.forward + cost.backward)
    seconds = cost.flops / flops
    return replace(cost, forward=(1 - share) * seconds, backward=share * seconds, update=0.0)
