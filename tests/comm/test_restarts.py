"""Processes that meet by a store in which others have left their words."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError

import pytest
import torch.distributed as dist

from robust_accel.comm.restarts import meeting_place


class Meetings:
    """Processes that each have a connection of their own to one store."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.threads = threads
        self.server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def come(self, rank: int, size: int, seconds: float = 60) -> Future[str]:
        store = dist.TCPStore("127.0.0.1", self.server.port, wait_for_workers=False)
        return self.threads.submit(meeting_place, store, rank, size, seconds)


@pytest.fixture
def meetings() -> Iterator[Meetings]:
    with ThreadPoolExecutor() as threads:
        yield Meetings(threads)


@pytest.mark.parametrize("size", [2, 3])
def test_each_attempt_meets_in_a_place_of_its_own_whoever_comes_first(
    meetings: Meetings, size: int
) -> None:
    places = set()
    for first in (*range(size), 0, 0):
        ranks = [*range(first, size), *range(first)]
        (place,) = {future.result() for future in [meetings.come(rank, size) for rank in ranks]}
        places.add(place)
    assert len(places) == size + 2


def test_of_those_that_are_gone_nothing_counts(meetings: Meetings) -> None:
    """One comes and goes, alone; others wait for it meanwhile, and meet the one in its place."""
    with pytest.raises(dist.DistStoreError, match="no answer from 0, 2"):
        meetings.come(1, 3, seconds=1).result()
    waiting = [meetings.come(rank, 3) for rank in (0, 2)]
    with pytest.raises(TimeoutError):
        waiting[0].result(timeout=2)
    assert len({future.result() for future in [meetings.come(1, 3), *waiting]}) == 1


def test_fewer_meet_after_more_have(meetings: Meetings) -> None:
    more, fewer = ([meetings.come(rank, size) for rank in range(size)] for size in (3, 2))
    assert {future.result() for future in more}.isdisjoint({future.result() for future in fewer})
