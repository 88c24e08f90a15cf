"""Heartbeats: which process of a run does not answer, where it was, and for how long.

Each process writes every second what it does into the store by which they found one another (under
torchrun the launcher keeps it). Nobody reads, until there is something to ask: this process has
not moved for half of the time limit, or a collective has failed.
"""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar

import torch.distributed as dist

from robust_accel.comm.restarts import launchers_store
from robust_accel.exit_codes import UNAVAILABLE, Unavailable

INTERVAL = 1.0
TIMEOUT = 600.0  # seconds, of work without a setting of its own
SILENT = 4.0  # seconds without a new beat; they come every second
_now = time.monotonic


@dataclass
class Beat:
    """What is known of a process here."""

    about: dict[str, Any]
    since: float  # when this was heard first, by our clock

    def __str__(self) -> str:
        return (
            f"rank {self.about['rank']} on {self.about['host']} (process {self.about['process']})"
        )

    @property
    def place(self) -> str:
        return f"step {self.about['step']} ({self.about['doing']})"


def leave(sentence: str) -> None:
    """End this process, wherever its main thread is, and say why."""
    print(f"\nrobust-accel: {sentence}", file=sys.stderr, flush=True)
    os._exit(UNAVAILABLE)


class Heartbeat:
    """Of this process among those of the default group, while the context lasts.

    Does nothing where there is one process, or no ``MASTER_ADDR`` by which they met.

    Args:
        timeout: Seconds without progress here after which one that does not answer ends the run.
        lost: Called by a thread with the sentence that names it; ends the process.
    """

    current: ClassVar["Heartbeat | None"] = None

    def __init__(self, timeout: float, lost: Callable[[str], None] = leave) -> None:
        self.timeout, self._lost = timeout, lost
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.is_on = several and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        self._rank, self._size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self._own: dict[str, Any] = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        self._own |= {"beat": 0, "step": 0, "doing": "start", "ended": None, "code": 0}
        self._moved = self._contact = _now()
        self._others: dict[int, Beat] = {}
        self._listening, self._closing = threading.Event(), threading.Event()
        self._meetings = 0
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Heartbeat":
        if self.is_on:
            token = [secrets.token_hex(8)]  # the store may be older than this group
            dist.broadcast_object_list(token)
            self._prefix = f"robust_accel/heartbeat/{token[0]}"
            self._store = self._connect()
            self._store.set(str(self._rank), json.dumps(self._own))
            for work in (self._beat, self._watch):
                thread = threading.Thread(target=work, name="heartbeat", daemon=True)
                self._threads.append(thread)
                thread.start()
            Heartbeat.current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.end(None if error is None else f"{type(error).__name__}: {error}")

    def end(self, reason: str | None, code: int = 1) -> None:
        """Say to the others that this process ends, and why if before its time.

        Args:
            code: Its exit code, or the negative of the signal that has asked it to end.
        """
        if not self.is_on or self._closing.is_set():
            return
        self._own |= {"ended": reason or "its work is done", "code": code if reason else 0}
        self._closing.set()
        self._threads[0].join(2 * INTERVAL)  # the last beat; not for ever if the store is gone
        Heartbeat.current = None

    def at(self, doing: str, step: int) -> None:
        """This process goes on: with what, at which step."""
        self._own |= {"doing": doing, "step": step}
        self._moved = _now()
        self._forget()

    def meet(self) -> None:
        """Wait for all processes, for as long as all of them answer.

        For work of which one may have much more than another: a collective has a time limit.

        Raises:
            Unavailable: One has ended instead.
        """
        if not self.is_on:
            return
        self._meetings += 1
        key = f"meeting/{self._meetings}"
        if self._store.add(key, 1) == self._size:
            self._store.set(f"{key}/complete", "")
        began, pause = _now(), INTERVAL / 200
        while not self._store.check([f"{key}/complete"]):
            time.sleep(pause)
            pause = min(1.5 * pause, INTERVAL)
            if _now() - began > SILENT:
                self._listening.set()
            if ended := self._ended():
                raise Unavailable("; ".join(ended))
        self._moved = _now()
        self._forget()

    def explain(self) -> tuple[str, int]:
        """After a failed collective, who has caused it; and with which code it has ended, if so.

        Takes a few seconds: one that is gone differs from the others by its silence.
        """
        if not self.is_on:
            return "a collective has failed", 0
        waited = _now() - self._moved
        self._listening.set()
        until = _now() + SILENT + 2 * INTERVAL
        while _now() < until and not self._ended():
            time.sleep(INTERVAL / 4)
        codes = [beat.about["code"] for beat in self._ended_early()]
        return self._sentence(waited), max(codes, default=0)

    def _forget(self) -> None:
        self._listening.clear()
        self._others = {}  # what was heard a while ago says nothing of who answers now

    # ---- threads ---------------------------------------------------------------------------------

    def _connect(self) -> dist.Store:
        return dist.PrefixStore(self._prefix, launchers_store(self.timeout))

    def _beat(self) -> None:
        """Tell, and listen where there is something to ask. Blocks for ever with the store."""
        try:
            store = self._connect()
            last, beat = False, 0
            while not last:
                last = self._closing.wait(INTERVAL)
                beat += 1
                self._own["beat"] = beat
                store.set(str(self._rank), json.dumps(self._own))
                self._contact = _now()
                if self._listening.is_set() or _now() - self._moved > self.timeout / 2:
                    self._listen(store)
        except RuntimeError:  # the store is gone: the watch sees that nothing is heard
            self._others = {}

    def _listen(self, store: dist.Store) -> None:
        for rank in range(self._size):
            if rank == self._rank or not store.check([str(rank)]):
                continue
            about = json.loads(store.get(str(rank)))
            known = self._others.get(rank)
            if known is None or known.about["beat"] != about["beat"]:
                self._others[rank] = Beat(about, _now())

    def _watch(self) -> None:
        told = 0.0
        while not self._closing.wait(min(INTERVAL, self.timeout / 10)):
            waited = _now() - self._moved
            if waited < self.timeout:
                continue
            if self._silent() or self._ended() or self._unheard():
                self._lost(self._sentence(waited))
            elif told < self._moved:  # all answer: the collective's own limit decides
                told = _now()
                print(f"\nrobust-accel: {self._sentence(waited)}", flush=True)

    # ---- what is heard ---------------------------------------------------------------------------

    def _unheard(self) -> bool:
        """Whether the store itself does not answer."""
        return _now() - self._contact > SILENT

    def _silent(self) -> list[Beat]:
        own = _now()
        return [b for b in self._others.values() if own - b.since > SILENT and not b.about["ended"]]

    def _ended_early(self) -> list[Beat]:
        return [beat for beat in self._others.values() if beat.about["code"]]

    def _ended(self) -> list[str]:
        return [f"{b} has ended at {b.place}: {b.about['ended']}" for b in self._ended_early()]

    def _sentence(self, waited: float) -> str:
        own = Beat(self._own, 0.0)
        if self._unheard():
            keeper = "the launcher of rank 0"
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                keeper = "rank 0"
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            found = [f"{keeper} at {address} does not answer, so it hangs or the network is down"]
        else:
            silent = [f"{b} does not answer, last heard of at {b.place}" for b in self._silent()]
            found = self._ended() + silent
        if not found:
            # those that are behind first; a few tell enough
            beats = sorted(self._others.values(), key=lambda beat: beat.about["step"])[:4]
            places = [f"{beat} is at {beat.place}" for beat in beats]
            found = ["all others answer", *places]
        return f"{own} has been at {own.place} for {waited:.0f} s: {'; '.join(found)}"


def is_collective_failure(error: Exception) -> bool:
    """Whether an exception is of the processes' connections, and not of what they compute."""
    if isinstance(error, Unavailable | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
