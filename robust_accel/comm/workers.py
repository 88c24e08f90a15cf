"""Who exchanges gradients with whom: all workers, or machines that each hold several."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Workers:
    """Process groups of one model's workers; None is the default group of torch.

    Attributes:
        group: all workers.
        replies: all of them again, for what servers send back; None is `group`. With it, messages
            there and back need not be sent in one order (see `Pipeline`).
        node: those on this machine, where every machine holds the same number, at least two, and
            there are several machines; None otherwise.
        peers: then, the worker at this one's place on each machine.
        places: then, for each worker of `node` its peers' ranks in `group`.
        num_machines: that hold them, where `of` has asked.
        made: those of these groups that `of` has made.
    """

    group: dist.ProcessGroup | None = None
    node: dist.ProcessGroup | None = None
    peers: dist.ProcessGroup | None = None
    replies: dist.ProcessGroup | None = None
    places: tuple[tuple[int, ...], ...] = ()
    num_machines: int = 1
    made: tuple[dist.ProcessGroup, ...] = ()

    def close(self) -> None:
        """Give up the groups that were made, with their threads and sockets."""
        for group in self.made:
            if group in dist.distributed_c10d._world.pg_map:
                dist.destroy_process_group(group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @classmethod
    def of(
        cls,
        group: dist.ProcessGroup | None,
        *,
        parent: dist.ProcessGroup | None,
        replies: bool = False,
    ) -> "Workers":
        """Find the machines and make the groups; each worker of the model must call it.

        Args:
            group: for all workers; None makes one like `parent`, for a thread of its own.
            parent: the model's group.
            replies: make a group for them, too.
        """
        ranks = dist.get_process_group_ranks(parent or dist.group.WORLD)
        nodes: list[str] = [""] * len(ranks)
        dist.all_gather_object(nodes, _machine(), group=parent)
        alone = len(ranks) < dist.get_world_size()
        made = [] if group is not None else [_like(parent, ranks, alone=alone)]
        group = group or made[0]
        members = [[r for r, n in zip(ranks, nodes, strict=True) if n == node] for node in nodes]
        sizes = {len(member) for member in members}
        if len(sizes) > 1 or sizes & {1, len(ranks)}:
            back = _like(parent, ranks, alone=alone) if replies else None
            given = [] if back is None else [back]
            return cls(group, replies=back, num_machines=len(set(nodes)), made=(*made, *given))
        machines = list(dict.fromkeys(map(tuple, members)))
        inside = _own(parent, machines)
        peers = list(zip(*machines, strict=True))
        across = _own(parent, peers)
        places = tuple(tuple(ranks.index(r) for r in sorted(same)) for same in peers)
        return cls(
            group,
            inside,
            across,
            places=places,
            num_machines=len(machines),
            made=(*made, inside, across),
        )


def _machine() -> str:
    # torchrun numbers its agents; hosts alone tell nothing where all have one name
    return f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}"


def _own(parent: dist.ProcessGroup | None, parts: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """The group of this process, where each part of the workers gets one."""
    rank = dist.get_rank()
    if sum(map(len, parts)) < dist.get_world_size():  # others cannot take part
        (own,) = (part for part in parts if rank in part)
        return _like(parent, own, alone=True)
    # each process makes all: by its members alone, a group may get the name of one that is gone
    # (torch 2.8), and wait for that one's processes
    groups = [_like(parent, part) for part in parts]
    (group,) = (group for group, part in zip(groups, parts, strict=True) if rank in part)
    return group


def _like(
    parent: dist.ProcessGroup | None, ranks: Sequence[int], *, alone: bool = False
) -> dist.ProcessGroup:
    """A group of these ranks with the parent's backends and time limit.

    Args:
        alone: Only its members take part in making it.
    """
    whole = parent or dist.group.WORLD
    assert whole is not None
    # a group may have a backend for each kind of device: the shortest limit is the one that holds
    backends = [whole._get_backend(device) for device in whole._device_types]
    limits = [getattr(getattr(b, "options", None), "_timeout", None) for b in backends]
    timeout = min((limit for limit in limits if limit is not None), default=None)
    backend = dist.get_backend_config(whole)
    # of a group that this process is not in, torch gives a number
    group: Any = dist.new_group(list(ranks), timeout, backend, use_local_synchronization=alone)
    return group


def check_device(device: str, group: dist.ProcessGroup) -> None:
    """Raise ValueError for tensors that the group's processes cannot exchange as we do."""
    backend = dist.get_backend(group)
    if device != "cpu" and (device != "cuda" or backend == "gloo"):
        raise ValueError(
            f"compress_gradients supports CPU, and CUDA with NCCL; got {device} with {backend}"
        )


def backends() -> list[str]:
    """By which processes can exchange tensors here."""
    names = ("gloo", "nccl", "mpi")
    return [name for name in names if getattr(dist, f"is_{name}_available")()]
