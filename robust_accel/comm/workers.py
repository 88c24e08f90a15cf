"""Who exchanges gradients with whom: all workers, or machines that each hold several."""

import os
import socket
from dataclasses import dataclass

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
        made: those of these groups that `of` has made.
    """

    group: dist.ProcessGroup | None = None
    node: dist.ProcessGroup | None = None
    peers: dist.ProcessGroup | None = None
    replies: dist.ProcessGroup | None = None
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
        made = [] if group is not None else [_like(parent, ranks)]
        group = group or made[0]
        members = [[r for r, n in zip(ranks, nodes, strict=True) if n == node] for node in nodes]
        sizes = {len(member) for member in members}
        if len(sizes) > 1 or sizes & {1, len(ranks)}:
            back = _like(parent, ranks) if replies else None
            return cls(group, replies=back, made=(*made, *([] if back is None else [back])))
        mine = members[ranks.index(dist.get_rank())]
        place = mine.index(dist.get_rank())
        peers = sorted({member[place] for member in members})
        inside, across = _like(parent, mine), _like(parent, peers)
        return cls(group, inside, across, made=(*made, inside, across))


def _machine() -> str:
    # torchrun numbers its agents; hosts alone tell nothing where all have one name
    return f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}"


def _like(parent: dist.ProcessGroup | None, ranks: list[int]) -> dist.ProcessGroup:
    """A group of these ranks with the parent's backends and time limit."""
    whole = parent or dist.group.WORLD
    assert whole is not None
    # a group may have a backend for each kind of device: the shortest limit is the one that holds
    backends = [whole._get_backend(device) for device in whole._device_types]
    limits = [getattr(getattr(b, "options", None), "_timeout", None) for b in backends]
    timeout = min((limit for limit in limits if limit is not None), default=None)
    # only its members take part in making a smaller group
    subset = len(ranks) < dist.get_world_size()
    backend = dist.get_backend_config(whole)
    group = dist.new_group(ranks, timeout, backend, use_local_synchronization=subset)
    assert isinstance(group, dist.ProcessGroup)
    return group


def backends() -> list[str]:
    """By which processes can exchange tensors here."""
    names = ("gloo", "nccl", "mpi")
    return [name for name in names if getattr(dist, f"is_{name}_available")()]
