"""How FSDP2 would cut a network, and what that sends: of each tensor a piece to each worker."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from torch import nn

from robust_accel.comm import QSGD, Collective
from robust_accel.comm.layout import Segment, segment
from robust_accel.comm.quantizer import Quantizer
from robust_accel.comm.traffic import Machines, Traffic, traffic

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # of layers, not one


class Unit(NamedTuple):
    """Shapes of the parameters that FSDP2 gathers together."""

    trained: Shapes
    frozen: Shapes = ()

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.trained + self.frozen)


def layers_of(network: nn.Module) -> tuple[str, tuple[Unit, ...]]:
    """The class whose modules are best gathered one by one: the least is whole at a time.

    Returns:
        Its name, and each layer, and last what is in none; an empty name and one unit where no
        class of modules is there twice.
    """
    numbers = Counter(
        type(module).__name__
        for module in network.modules()
        if list(module.children()) and not isinstance(module, _CONTAINERS)
    )
    names = ("", *(name for name, number in numbers.items() if number > 1))
    cuts = {name: units_of(network, name) for name in names}
    name = min(cuts, key=lambda name: whole_at_a_time(cuts[name]))
    return name, cuts[name]


def whole_at_a_time(units: Sequence[Unit]) -> int:
    """Elements of the rest, which stays gathered, and of the largest layer beside it."""
    *layers, rest = units
    return rest.size + max((layer.size for layer in layers), default=0)


def units_of(network: nn.Module, layer: str) -> tuple[Unit, ...]:
    """Each module of a class, and last the rest."""
    layers = [m for m in network.modules() if type(m).__name__ == layer and m is not network]
    taken: set[int] = set()
    units = []
    for module in (*reversed(layers), network):  # an inner one is by itself
        own = [p for p in module.parameters() if id(p) not in taken]
        taken.update(map(id, own))
        kinds = ([p for p in own if p.requires_grad is trained] for trained in (True, False))
        units.append(Unit(*(tuple(tuple(p.shape) for p in kind) for kind in kinds)))
    return tuple(units)


def piece(shape: Sequence[int], workers: int) -> Segment:
    """Of each worker: cut in the first dimension, and filled up."""
    rows = max(1, shape[0] if shape else 1)
    return Segment(-(-rows // workers) * (math.prod(shape) // rows), 0, segment(shape, 0).raw)


def pieces_of(shapes: Iterable[Sequence[int]], workers: int) -> list[Segment]:
    """Of each tensor that of one worker."""
    return [piece(shape, workers) for shape in shapes]


def gathered(
    shapes: Iterable[Sequence[int]], workers: int, width: int, quantizer: Quantizer | None
) -> int:
    """Bytes that a worker sends for all to have these weights: ``width`` an element, or fewer."""
    own = pieces_of(shapes, workers)
    each = width * _elements(own) if quantizer is None else quantizer.num_bytes(own)
    return (workers - 1) * each


def scattered(
    collective: Collective, shapes: Shapes, machines: Machines, holders: int, *, on_cpu: bool
) -> Traffic:
    """Of gradients that are reduced to pieces; see ``ShardingCollective.scatter``.

    Args:
        holders: Workers that hold the weights together: all, or, with HSDP, a machine's, whose
            means are then averaged between machines.
        on_cpu: Where fp32's reduce-scatter is an all-reduce.
    """
    own, nodes = pieces_of(shapes, holders), machines.nodes
    in_fp32, ring = 4 * _elements(own), (2 if on_cpu else 1) * (holders - 1)
    if holders < machines.workers:
        # of the sizes that they have, and quantised or not as the whole tensors are
        means = [(one.size,) if one.raw else (1, one.size) for one in own]
        copies = traffic(collective, means, Machines(nodes, 1))
        return Traffic(ring * in_fp32 + copies.sent, holders * copies.leaving, 0.0)
    if isinstance(collective, QSGD):
        if collective.block_size == "whole":
            own = [Segment(_elements(own), 0, raw=False)]
        senders = machines.per_node if nodes > 1 else 1  # that have taken means among themselves
        parts = holders // senders
        between = (parts - 1) * collective.quantizer.num_bytes(own)
        sent, leaving = (senders - 1) * parts * in_fp32 + between, senders * between
    else:
        is_half = getattr(collective, "dtype", "fp32") != "fp32"
        sent = leaving = ring * in_fp32 // (1 + is_half)
    return Traffic(sent, leaving if nodes > 1 else 0, 0.0)


def _elements(segments: Iterable[Segment]) -> int:
    return sum(one.size for one in segments)
