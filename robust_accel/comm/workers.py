"""Who exchanges gradients with whom: all workers, or machines that each hold several."""

import os
import socket
from dataclasses import dataclass

import torch
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
    """

    group: dist.ProcessGroup | None = None
    node: dist.ProcessGroup | None = None
    peers: dist.ProcessGroup | None = None
    replies: dist.ProcessGroup | None = None

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
        group = group or _like(parent, ranks)
        members = [[r for r, n in zip(ranks, nodes, strict=True) if n == node] for node in nodes]
        sizes = {len(member) for member in members}
        if len(sizes) > 1 or sizes & {1, len(ranks)}:
            return cls(group, replies=_like(parent, ranks) if replies else None)
        mine = members[ranks.index(dist.get_rank())]
        place = mine.index(dist.get_rank())
        peers = sorted({member[place] for member in members})
        return cls(group, _like(parent, mine), _like(parent, peers))


def _machine() -> str:
    # torchrun numbers its agents; hosts alone tell nothing where all have one name
    return f"{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}"


def _like(parent: dist.ProcessGroup | None, ranks: list[int]) -> dist.ProcessGroup:
    """A group of these ranks with the parent's backend and time limit."""
    backend = dist.get_backend(parent)
    options = None
    parent = parent or dist.group.WORLD
    if backend == "gloo" and parent is not None:
        options = getattr(parent._get_backend(torch.device("cpu")), "options", None)
    timeout = getattr(options, "_timeout", None)
    # only its members take part in making a smaller group
    subset = len(ranks) < dist.get_world_size()
    group = dist.new_group(ranks, timeout, backend, use_local_synchronization=subset)
    assert isinstance(group, dist.ProcessGroup)
    return group
