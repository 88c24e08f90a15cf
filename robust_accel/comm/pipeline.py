"""Exchanges that overlap: one is computed while others are on the network."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeAlias

import torch.distributed as dist

Exchange: TypeAlias = Iterator[dist.Work]  # computes, and yields whatever it then waits for


class Pipeline:
    """Exchanges under way, at most `depth` of them.

    They begin in the order in which they are added, and go through each later stage in it too. But
    whether one's second message or another's first is sent earlier depends on when that other one
    was added: messages of different stages need groups of their own, unless all is added at once.
    """

    def __init__(self, depth: int = 4) -> None:
        self._depth = depth
        self._under_way: deque[tuple[Exchange, dist.Work]] = deque()

    def __len__(self) -> int:
        return len(self._under_way)

    def add(self, exchange: Exchange) -> None:
        """Make room, and start an exchange."""
        while len(self) >= self._depth:
            self.advance()
        self._resume(exchange)

    def advance(self) -> None:
        """Wait for what was sent first, and go on with its exchange."""
        exchange, work = self._under_way.popleft()
        work.wait()
        self._resume(exchange)

    def finish(self) -> None:
        """Bring all to their end."""
        while self:
            self.advance()

    def clear(self) -> None:
        """Give up all."""
        self._under_way.clear()

    def _resume(self, exchange: Exchange) -> None:
        work = next(exchange, None)
        if work is not None:
            self._under_way.append((exchange, work))


def run_all(exchanges: Iterable[Exchange]) -> None:
    """Bring exchanges to their end, in an order that depends on nothing but their number."""
    pipeline = Pipeline()
    for exchange in exchanges:
        pipeline.add(exchange)
    pipeline.finish()
