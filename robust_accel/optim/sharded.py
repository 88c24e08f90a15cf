"""Parameters that lie in pieces on several processes (DTensor: FSDP2, tensor parallelism)."""

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


class Over(NamedTuple):
    """The processes that hold a tensor's pieces."""

    mesh: DeviceMesh
    dims: tuple[int, ...]  # of the mesh, in which it is cut; in others it is copied

    def sum(self, values: Tensor) -> Tensor:
        """Sum over them, in place. Every process of the mesh must call it."""
        for dim in self.dims:
            dist.all_reduce(values, group=self.mesh.get_group(dim))
        return values


def over(param: Tensor) -> Over | None:
    """None: it is whole."""
    if not isinstance(param, DTensor):
        return None
    placements = enumerate(param.placements)
    dims = tuple(dim for dim, placement in placements if not placement.is_replicate())
    return Over(param.device_mesh, dims) if dims else None


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process that holds a piece of it; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a tensor, cut as ``like`` is; it is no copy where it is cut so."""
    if not isinstance(tensor, DTensor):
        return tensor
    assert isinstance(like, DTensor)
    if tensor.placements != like.placements:  # a gradient's, under tensor parallelism
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    return tensor.to_local()
