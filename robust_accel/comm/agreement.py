"""What the processes agree on: at every step, without waiting for one another; and in bits."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


class Agreement:
    """The highest number that any process has given, the same on all, one step later.

    The all-reduce of one step runs during the next, on the CPUs and in a group of its own, so that
    neither gradients nor a GPU wait for it.

    Args:
        timeout: Seconds that one process waits for another.
    """

    def __init__(self, timeout: float) -> None:
        self._group: dist.ProcessGroup | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.new_group(timeout=timedelta(seconds=timeout), backend="gloo")
            assert isinstance(group, dist.ProcessGroup)  # of which every process is a member
            self._group = group
        self._number = torch.zeros(1, dtype=torch.int64)
        self._pending: dist.Work | None = None

    def highest(self, number: int) -> int:
        """Of what all gave at the call before; alone, of this one. Every process must call it."""
        if self._group is None:
            return number
        answer = self._answer()
        self._number.fill_(number)
        self._pending = dist.all_reduce(
            self._number, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return answer

    def close(self) -> None:
        """Give up the group; every process must call it."""
        self._answer()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _answer(self) -> int:
        if self._pending is None:
            return 0
        self._pending.wait()
        self._pending = None
        return int(self._number.item())


def same_bits(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> bool:
    """Whether tensors are the same on all ranks of a group, as far as sums of their bits tell.

    Of the bits: a NaN that all ranks have is the same.
    """
    own = torch.stack([t.view(_INTEGERS[t.itemsize]).sum(dtype=torch.int64) for t in tensors])
    largest, smallest = own.clone(), own.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=group)
    return torch.equal(largest, smallest)
