"""What communication cost: bytes sent by this rank, and the seconds spent on it."""

import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


class Meter:
    """Cumulative counts of one rank; read them between steps.

    Attributes:
        bytes_sent: payload and metadata that this rank sent, by each collective's formula.
        bytes_inside_machine: how many of them never left the machine.
        knows_exposed: whether `exposed_seconds` can be told.
    """

    def __init__(self) -> None:
        self.bytes_sent = 0
        self.bytes_inside_machine = 0
        self.knows_exposed = True
        self._seconds = 0.0
        self._exposed_seconds = 0.0
        self._lock = threading.Lock()
        self._under_way = 0
        self._busy_since = 0.0
        self._pending: deque[tuple[Any, Any, Any]] = deque()  # CUDA events not yet read

    @property
    def seconds(self) -> float:
        """Wall time in which a gradient was under way: encoded, sent, waited for, decoded."""
        self._collect(wait=True)
        return self._seconds

    @property
    def exposed_seconds(self) -> float:
        """The part of it that backward did not hide: from the last bucket's arrival to its end.

        NaN where nothing tells: FSDP2 on GPUs, whose backward waits for each module in its turn.
        """
        self._collect(wait=True)
        return self._exposed_seconds if self.knows_exposed else math.nan

    def sent(self, num_bytes: float, *, inside_machine: bool = False) -> None:
        """Count one collective's traffic, rounded to whole bytes."""
        self.bytes_sent += round(num_bytes)
        self.bytes_inside_machine += round(num_bytes) * inside_machine

    def arrived(self) -> float:
        """A gradient is under way from now on, a reading of `time.perf_counter()`."""
        with self._lock:
            now = time.perf_counter()
            if self._under_way == 0:
                self._busy_since = now
            self._under_way += 1
            return now

    def left(self) -> None:
        """One of them has come to its end."""
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0:
                self._seconds += time.perf_counter() - self._busy_since

    @contextmanager
    def timed(self, *, exposed: bool) -> Iterator[None]:
        """A gradient is under way in the block, and the backward waits for it if `exposed`."""
        since = self.arrived()
        try:
            yield
        finally:
            if exposed:
                self.exposed(since)
            self.left()

    def exposed(self, since: float) -> None:
        """Count what has passed since a `time.perf_counter()` reading as not hidden."""
        self._exposed_seconds += time.perf_counter() - since

    @contextmanager
    def timed_stream(self, *, exposed_since: Any = None) -> Iterator[None]:
        """The same for work queued on the current CUDA stream; `exposed_since` is an event."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        try:
            yield
        finally:
            end.record()
            self._pending.append((start, end, exposed_since))
            self._collect(wait=False)

    def timed_on(self, device: torch.device, *, exposed: bool) -> AbstractContextManager[None]:
        """Whichever of both a device takes: a CPU waits in the block, a GPU's stream in its own."""
        if device.type != "cuda":
            return self.timed(exposed=exposed)
        now = torch.cuda.Event(enable_timing=True) if exposed else None
        if now is not None:
            now.record()
        return self.timed_stream(exposed_since=now)

    def _collect(self, *, wait: bool) -> None:
        while self._pending and (wait or self._pending[0][1].query()):
            start, end, exposed_since = self._pending.popleft()
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000  # milliseconds
            if exposed_since is not None:
                self._exposed_seconds += exposed_since.elapsed_time(end) / 1000
