"""Where the tensors of one FSDP2 module lie in what its workers send."""

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from robust_accel.comm.layout import Segment, segment


class Pieces:
    """The pieces of one module's parameters: a row for each worker, cut in their first dimension.

    Args:
        module: One of those that `fully_shard` has got.
        position: Of its first element among all modules': numbers the random draws.
        group: The workers.
    """

    def __init__(self, module: FSDPModule, position: int, group: dist.ProcessGroup) -> None:
        self.position, self._num_workers = position, dist.get_world_size(group)
        assert isinstance(module, nn.Module)
        self._parameters = _parameters_of(module)
        self.num_elements = sum(map(self._size, self._parameters)) * self._num_workers
        self._known: dict[tuple[int, bool], list[list[Segment]]] = {}

    def rows(self, size: int, *, trained: bool) -> list[list[Segment]]:
        """The tensors in each row of `size` elements: of those that are trained, or of all.

        Which parameters had no gradient, and which modules share an exchange
        (`fully_shard([a, b])`), FSDP2 does not tell: blocks then lie anywhere in a row.
        """
        if (size, trained) not in self._known:
            parameters = [p for p in self._parameters if p.requires_grad or not trained]
            sizes = [self._size(p) for p in parameters]
            pieces = [(n, segment(p.shape, 0).raw) for n, p in zip(sizes, parameters, strict=True)]
            if sum(sizes) != size:
                pieces = [(size, False)]
            rows: list[list[Segment]] = [[] for _ in range(self._num_workers)]
            position = self.position
            for length, raw in pieces:
                for row in rows:
                    row.append(Segment(length, position, raw))
                    position += length
            self._known[size, trained] = rows
        return self._known[size, trained]

    def _size(self, parameter: nn.Parameter) -> int:
        """Elements of one worker's piece, with what fills it up."""
        assert isinstance(parameter, DTensor)
        (placement,) = parameter.placements
        assert isinstance(placement, Shard)
        rows = parameter.shape[placement.dim]
        return -(-rows // self._num_workers) * (parameter.numel() // max(rows, 1))


def _parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """Those that FSDP2 sends together, in its order: children first, without shards inside."""
    found: dict[int, nn.Parameter] = {}
    seen = set()

    def collect(part: nn.Module) -> None:
        seen.add(part)
        for child in part.children():
            if child not in seen and not isinstance(child, FSDPModule):
                collect(child)
        found.update({id(p): p for p in part.parameters(recurse=False)})

    collect(module)
    return list(found.values())
