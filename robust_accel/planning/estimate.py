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
        flops: A second, by precision: dense, of its tensor cores where torch uses them for it.
        memory: Bytes.
        tf32: A second, of convolutions in fp32, which torch leaves to TF32 where there is one.
    """

    flops: Mapping[str, float]
    memory: float
    tf32: float

    def of_convolutions(self, precision: str) -> float:
        return self.tf32 if precision == "fp32" else self.flops[precision]


DEVICES = {
    "v100": Device({"fp32": 15.7e12, "bf16": 15.7e12, "fp16": 125e12}, 32 * 2**30, 15.7e12),
    "a100": Device({"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12}, 80 * 2**30, 156e12),
    "h100": Device({"fp32": 67e12, "bf16": 989e12, "fp16": 989e12}, 80 * 2**30, 495e12),
}
"""NVIDIA's data sheets, SXM, without sparsity."""


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
        is_in_pieces: Whether the weights are shared out, by FSDP2.
    """

    name: str
    memory: float
    leaving: float = 0.0
    is_in_pieces: bool = False


def engines(
    cost: Cost,
    machines: Machines,
    images: int,
    micro_batches: int,
    collective: Collective,
    *,
    half: bool,
) -> list[Engine]:
    """Weights, gradients, state, and what the backward needs.

    DDP has its gradients twice (its buckets). ZeRO 1 shares out the state, and has a copy of its
    share of the weights; ZeRO 2 the gradients as well. FSDP2 shares out all, and gathers a layer's
    weights for each pass, or all once a step (``train.keep_gathered``), round a ring of all
    workers; as HSDP it does so within each machine. What kernels, caches, gathered layers and the
    communication library take is not in it.

    Args:
        half: Whether the network computes in half precision.
    """
    passing = cost.kept * images
    rest = cost.average + cost.fixed + passing
    kept = cost.state + cost.gradients + cost.weights + cost.average
    sent = gathered_bytes(cost, collective, half=half)

    def in_pieces(name: str, workers: int, gathers: int, copy: float = 0.0) -> Engine:
        share = (workers - 1) / workers if workers > machines.per_node else 0.0
        leaving = micro_batches * gathers * share * sent
        return Engine(name, kept / workers + passing + copy, leaving, True)

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
        in_pieces("FSDP2, keep_gathered", machines.workers, 1, _weights_bytes(cost, half)),
        in_pieces("FSDP2", machines.workers, cost.gathers),
    ]


def gathered_bytes(cost: Cost, collective: Collective, *, half: bool) -> float:
    """Of all weights as FSDP2 gathers them: in fp32 or half precision, or quantised."""
    quantizer = getattr(collective, "weight_quantizer", None)
    if quantizer is not None:
        return float(quantizer.num_bytes([segment(shape, 0) for shape in cost.all_shapes]))
    return _weights_bytes(cost, half)


def _weights_bytes(cost: Cost, half: bool) -> float:
    """Of all weights as the network computes with them."""
    return cost.parameters * (2.0 if half else 4.0)


def at_speed(cost: Cost, flops: float, of_convolutions: float) -> Cost:
    """The same work at so many operations a second; the update counts nothing then."""
    share = cost.backward / (cost.forward + cost.backward)
    seconds = (cost.flops - cost.convolutions) / flops + cost.convolutions / of_convolutions
    return replace(cost, forward=(1 - share) * seconds, backward=share * seconds, update=0.0)
