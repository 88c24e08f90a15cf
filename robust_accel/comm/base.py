"""What protocols and engines share: a protocol, its exchanges, which overlap, and it at work."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from robust_accel.comm.layout import Segment
from robust_accel.comm.meter import Meter
from robust_accel.comm.workers import Workers


class Waited(Protocol):
    """Something that was sent."""

    def wait(self) -> Any: ...


class All:
    """Several messages that are sent at once, and waited for together."""

    def __init__(self, works: Iterable[Waited]) -> None:
        self._works = list(works)

    def wait(self) -> None:
        for work in self._works:
            work.wait()


# computes, and yields whatever it then waits for
Exchange: TypeAlias = Iterator[Waited]


class Collective(Protocol):
    """A protocol; its public fields are the recipe's keys."""

    def exchanges(
        self, flat: Tensor, segments: Sequence[Segment], step: int, workers: Workers, meter: Meter
    ) -> Sequence[Exchange]:
        """Average a gradient over the workers, in its own memory and in parts.

        Args:
            flat: [d] fp32, this worker's gradient; when all parts have come to their end, the mean,
                bit-identical on every rank.
            segments: the parameter tensors that lie end to end in `flat`, the same on every rank.
            step: number of the exchange, the same on every rank; seeds the rounding.
            workers: the process groups.
            meter: counts the bytes that this rank sends.

        Returns:
            The parts, which do not depend on one another, the same on every rank.
        """
        ...


# the tensors' pieces that lie end to end in each worker's part
Chunks: TypeAlias = Sequence[Sequence[Segment]]


class ShardingCollective(Collective, Protocol):
    """A protocol for sharded models (FSDP2), too: each worker keeps its piece of the mean alone."""

    def scatter(
        self, rows: Tensor, chunks: Chunks, step: int, workers: Workers, meter: Meter, out: Tensor
    ) -> None:
        """Average a gradient over the workers, each worker its own chunk of it.

        Args:
            rows: [M, n] of a floating point type, this worker's gradient: row i is worker i's
                chunk. It may be overwritten.
            chunks: the tensors' pieces that lie end to end in each row, of the same sizes in all.
            step: number of the exchange, the same on every rank; seeds the rounding.
            workers: the process groups.
            meter: counts the bytes that this rank sends.
            out: [n] of the same type, filled with the mean of this worker's chunk.
        """
        ...


class Pipeline:
    """Exchanges under way, at most `depth` of them.

    They begin in the order in which they are added, and go through each later stage in it too. But
    whether one's second message or another's first is sent earlier depends on when that other one
    was added: messages of different stages need groups of their own, unless all is added at once.
    """

    def __init__(self, depth: int = 4) -> None:
        self._depth = depth
        self._under_way: deque[tuple[Exchange, Waited]] = deque()

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


class GradientCompression:
    """A protocol at work in one model; `compress_gradients` makes it. On one process, none is.

    Attributes:
        meter: bytes and seconds so far, of this rank.
        gathered: bytes so far that this rank sent of FSDP2's weights; elsewhere there are none.
        steps: synchronised backward passes so far; seeds the rounding, hence part of a checkpoint.
            (DeepSpeed: of the last exchange, from the engine's own step, which its checkpoint has.)
    """

    def __init__(self) -> None:
        self.meter, self.gathered = Meter(), Meter()
        self.steps = 0
        self._closed = False

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]

    def close(self) -> None:
        """Release what it holds beside the model; an exchange raises afterwards."""
        self._closed = True

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise RuntimeError("gradient compression was closed: its model cannot train any more")


def averaging(
    collective: Collective,
    buffer: Tensor,
    segments: Sequence[Segment],
    step: int,
    workers: Workers,
    meter: Meter,
) -> tuple[Sequence[Exchange], Callable[[], Tensor]]:
    """Set about replacing a gradient of any floating point type by its mean, in its own memory.

    Returns:
        The exchanges, and what to call after all of them: it returns `buffer`, the mean.
    """
    flat = buffer.float()
    exchanges = collective.exchanges(flat, segments, step, workers, meter)
    return exchanges, lambda: buffer if flat is buffer else buffer.copy_(flat)


def averaged(
    collective: Collective,
    buffer: Tensor,
    segments: Sequence[Segment],
    step: int,
    workers: Workers,
    meter: Meter,
) -> Tensor:
    """The same, to its end."""
    exchanges, finish = averaging(collective, buffer, segments, step, workers, meter)
    run_all(exchanges)
    return finish()
