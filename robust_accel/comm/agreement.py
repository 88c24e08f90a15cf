"""What the processes agree on at every step, without waiting for one another."""

from datetime import timedelta

import torch
import torch.distributed as dist


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
