"""From what a worker's step takes to the step of many machines, by each engine and protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from robust_accel.comm import QSGD, AllReduce, Collective
from robust_accel.comm.traffic import Machines, Traffic, traffic
from robust_accel.planning.cost import Cost
from robust_accel.planning.pieces import gathered, pieces_of, scattered, whole_at_a_time

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
class Job:
    """A step of many workers.

    Attributes:
        cost: Of one of them.
        rate: Bytes a second that leave a machine.
        images: Of a worker in a micro-batch.
        micro_batches: One after another.
        half: Whether the network computes in half precision.
        timed_on: See ``traffic``.
    """

    cost: Cost
    machines: Machines
    rate: float
    images: int
    micro_batches: int = 1
    half: bool = False
    timed_on: torch.device | None = None

    @property
    def on_cpu(self) -> bool:
        return self.timed_on is not None and self.timed_on.type == "cpu"


@dataclass(frozen=True)
class Engine:
    """What holds weights, gradients and state.

    Attributes:
        moments: Bytes of a worker at each moment that may be the worst.
        holders: Workers that hold the weights together, by FSDP2; 1 where each has all.
        sharing: Workers that share out the optimizer's step.
        exchanges: Of gradients in a step.
        beside: Bytes of weights that leave a machine in a step while it computes.
        apart: And while it waits.
        overlaps: Whether a GPU computes while gradients are sent.
    """

    name: str
    moments: Mapping[str, float]
    holders: int = 1
    sharing: int = 1
    exchanges: int = 1
    beside: float = 0.0
    apart: float = 0.0
    overlaps: bool = True

    @property
    def worst(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def memory(self) -> float:
        return self.moments[self.worst]

    @property
    def leaving(self) -> float:
        """Bytes of weights that leave a machine in a step."""
        return self.beside + self.apart

    def seconds(self, job: Job, sent: Traffic) -> float:
        """Of a step, each of whose exchanges of gradients is ``sent``.

        On GPUs the last backward hides what it can of the exchange, and all passes hide what they
        gather, but the link has one thing at a time. A worker that has one core for both hides
        nothing. Latencies count nothing, nor does what stays inside of a machine.
        """
        cost = job.cost
        backward = cost.backward * job.images
        passes = job.micro_batches * (cost.forward * job.images + backward)
        exchange = self.exchanges * (sent.leaving / job.rate + sent.seconds)
        weights = self.beside / job.rate
        if self.overlaps and not job.on_cpu:
            step = max(passes + max(0.0, exchange - backward), weights + exchange)
        else:
            step = passes + weights + exchange
        return step + cost.update / self.sharing + self.apart / job.rate


@dataclass(frozen=True)
class Estimate:
    """A step by one engine and one protocol: what an exchange sends, and all seconds."""

    engine: str
    protocol: str
    traffic: Traffic
    step: float


def estimates(
    job: Job, held: Sequence[Engine], protocols: Mapping[str, Collective]
) -> list[Estimate]:
    """Of each engine by each protocol, whose arithmetic takes what it takes under DDP.

    FSDP2 exchanges what there is of a layer's gradient after each backward through it. An outer
    loss of several forwards (TRADES) has several: after the first there is that of micro-batches
    before, after the last this one's.
    """
    shapes, machines = job.cost.shapes, job.machines
    *layers, rest = job.cost.units
    exchanges = min(job.cost.losses, 2) if job.micro_batches > 1 else 1
    in_pieces = (*exchanges * tuple(s for one in layers for s in one.trained), *rest.trained)
    whole = {n: traffic(one, shapes, machines, job.timed_on) for n, one in protocols.items()}
    found = []
    for engine in held:
        for name, collective in protocols.items():
            sent = whole[name]
            if engine.holders > 1:
                holders = engine.holders
                own = scattered(collective, in_pieces, machines, holders, on_cpu=job.on_cpu)
                sent = replace(own, seconds=sent.seconds)
            found.append(Estimate(engine.name, name, sent, engine.seconds(job, sent)))
    return found


def engines(job: Job, collective: Collective) -> list[Engine]:
    """Weights, gradients, state, and what the backward needs.

    DDP has its gradients twice (its buckets). ZeRO 1 shares out the state, and has a copy of its
    share of the weights, which all gather after the step; ZeRO 2 the gradients as well, which it
    exchanges after each micro-batch. As DeepSpeed is set unless told otherwise, it computes
    nothing meanwhile. FSDP2 shares out all; as HSDP within each machine. What kernels, caches and
    the communication library take is not in it.
    """
    cost, machines = job.cost, job.machines
    workers = machines.workers
    rest = cost.average + cost.fixed + cost.kept * job.images
    state, gradients, weights = (n / workers for n in (cost.state, cost.gradients, cost.weights))
    trained = (workers - 1) * gradients if machines.nodes > 1 else 0.0  # weights, of the same size
    found = [Engine("DDP", {"step": cost.weights + 2 * cost.gradients + cost.state + rest})]
    for name, kept, exchanges in (
        ("ZeRO 1", cost.gradients, 1),
        ("ZeRO 2", gradients, job.micro_batches),
    ):
        moments = {"step": cost.weights + kept + state + weights + rest}
        found.append(Engine(name, moments, 1, workers, exchanges, apart=trained, overlaps=False))
    if machines.nodes > 1 and machines.per_node > 1:
        found.append(_in_pieces("HSDP", job, collective, machines.per_node))
    if workers > 1:
        whole = _in_pieces("FSDP2, keep_gathered", job, collective, workers, keeps=True)
        found += [whole, _in_pieces("FSDP2", job, collective, workers)]
    return found


def _in_pieces(
    name: str, job: Job, collective: Collective, holders: int, *, keeps: bool = False
) -> Engine:
    """By FSDP2, as ``training.shards`` cuts a network that is whole at first, and when measured.

    What no layer holds stays gathered from a forward to the backward after it; a layer is gathered
    for each pass; all only once a step where the training ``keeps`` it. Until micro-batches have
    come to their end, each worker has all of their gradient.
    """
    cost, width = job.cost, 2 if job.half else 4
    *layers, rest = [unit.trained + unit.frozen for unit in cost.units]
    of_layers = [shape for layer in layers for shape in layer]
    pieces = pieces_of([*of_layers, *rest], holders)
    share = sum(one.size for one in pieces) / cost.parameters
    held = share * (cost.weights + cost.state + cost.average)
    gradients = cost.gradients * (1.0 if job.micro_batches > 1 else share)
    whole = cost.parameters if keeps else whole_at_a_time(cost.units)
    moments = {
        "start": cost.weights + cost.average,
        "step": held + gradients + cost.kept * job.images + width * whole,
        "validation": held + cost.weights,
    }
    engine = Engine(name, moments, holders, holders)
    if job.machines.nodes == 1 or holders < job.machines.workers:
        return engine  # what is gathered stays inside
    bits = getattr(collective, "weight_quantizer", None)
    by_pass, by_round = (
        job.micro_batches * gathered(some, holders, width, bits) for some in (of_layers, rest)
    )
    if keeps:
        return replace(engine, apart=by_pass + by_round)
    return replace(engine, beside=cost.gathers * by_pass + cost.rounds * by_round)


def at_speed(cost: Cost, flops: float, of_convolutions: float) -> Cost:
    """The same work at so many operations a second; the update counts nothing then."""
    share = cost.backward / (cost.forward + cost.backward)
    seconds = (cost.flops - cost.convolutions) / flops + cost.convolutions / of_convolutions
    return replace(cost, forward=(1 - share) * seconds, backward=share * seconds, update=0.0)
