"""Ends a run in good time, with nothing lost: at a signal, by the clock, without its launcher."""

import atexit
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar, NoReturn

from robust_accel.exit_codes import Stopped

REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGALRM)
GRACE = 5.0
OVERSEER = "ROBUST_ACCEL_OVERSEER"
"""Environment: the process that has started the launcher, and without which a run ends, too, as
``process_mark`` has it."""
_writing = threading.RLock()
_now = time.monotonic


class Stop:
    """Requests to end, while the context lasts: signals that were not ignored before, and a clock.

    A request raises ``Stopped`` where it is met. While ``held`` it waits: the loop asks for it
    after each step, and what is being written is written.

    Args:
        max_time: Seconds of this process's life, in which a checkpoint must still be written.
    """

    grace: ClassVar[float] = GRACE
    """Seconds in which a process whose launcher is gone ends by itself: two steps and some."""

    def __init__(self, max_time: float | None = None) -> None:
        self.request = 0  # the signal that asked
        self._until = None if max_time is None else _now() + max_time - process_age()
        # until the first step and checkpoint have been measured
        self._reserve = 0.0 if max_time is None else min(30.0, 0.05 * max_time)
        self._holds = 0
        self._longest_step = self._last_save = 0.0
        self._step_began: float | None = None
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self  # only that one can have handlers
        for number in REQUESTS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as of SIGHUP under nohup
                self._before[number] = signal.signal(number, self._ask)
        if self._until is not None:
            left = self._until - self._reserve - _now()
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._until is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker: it ends when this process ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        first = not self.request
        self.request = self.request or number
        if first and not self._holds:  # a second one must not disturb what ends already
            raise Stopped(number)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A request waits until the end of this; then it raises ``Stopped``."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self.request and not self._holds:
            raise Stopped(self.request)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Held; a process without launcher ends only after it; and its seconds count."""
        began = _now()
        with self.held(), _writing:
            yield
            self._last_save = _now() - began
            self._step_began = None  # this was no step

    def after_step(self) -> int:
        """The signal that asks to end here, 0 if none does; to be called after each step.

        The clock asks in time for two more of the longest step so far, and for a checkpoint that
        takes twice as long as the last.
        """
        now = _now()
        if self._step_began is not None:
            seconds = now - self._step_began
            self._longest_step = max(self._longest_step, seconds)
            Stop.grace = GRACE + 2 * seconds
        self._step_began = now
        if self._until is not None and not self.request:
            needed = 2 * self._longest_step + max(2 * self._last_save, self._reserve)
            if now + needed > self._until:
                self.request = signal.SIGALRM
        return self.request


def process_age() -> float:
    """Seconds since this process was started; 0 where Linux's /proc is not there to tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def leave(code: int) -> NoReturn:
    """End this process without taking Python down piece by piece, which lasts seconds.

    Launchers kill what is slow to go, and then know nothing of its code.
    """
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_launched() -> bool:
    """Whether a launcher has started this process: torchrun, accelerate, deepspeed, mpirun."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def is_restarted() -> bool:
    """Whether torchrun has started this run's processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def refuse_restart() -> None:
    """Make torchrun end, which would start anew what ends with an error (``--max_restarts``)."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts > 0 and os.environ.get("LOCAL_RANK") == "0" and os.getppid() > 1:
        os.kill(os.getppid(), signal.SIGTERM)


def tell_launcher(text: str) -> None:
    """Have torchrun, which Accelerate starts, show a sentence in its table of failures."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": text, "timestamp": int(time.time())}))


def end_without_launcher(code: int, say: Callable[[str], None] | None = None) -> None:
    """Watch the launcher, and a study above it, from a thread: without them, this process ends.

    First as by SIGTERM, with a checkpoint; after ``Stop.grace`` in any case, even where the main
    thread waits for others for ever.

    Args:
        code: The exit code then.
        say: Where the sentence goes; standard error when not given.
    """
    overseer = os.environ.get(OVERSEER, "")
    if overseer and not _is_there(overseer):  # on another machine, say
        overseer = ""
    if not is_launched() and not overseer:
        return
    tell = say or (lambda text: print(text, file=sys.stderr, flush=True))
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and not _is_orphan() and _is_there(overseer):
            time.sleep(0.5)
        tell(f"\nrobust-accel: the launcher (process {parent}) is gone, and this process ends, too")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(Stop.grace)
        with _writing:
            os._exit(code)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def process_mark(process: int) -> str:
    """What tells a process from all others that have had or will have its number; Linux only."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{process}:{fields[19]}:{boot}"


def _is_there(mark: str) -> bool:
    """Whether the process of a mark lives; nothing stands for none that is asked for."""
    return not mark or process_mark(int(mark.partition(":")[0])) == mark


def _is_orphan() -> bool:
    """Whether torch's launcher was gone before it could be watched: it is Python, init is not."""
    if os.getppid() != 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        return b"python" not in Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return False
