"""What becomes of an action that may crash, hang or eat all memory: it is done in a fork."""

import os
import resource
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil


def outcome(action: Callable[[], object], *, seconds: float = 60, memory: int = 2**31) -> str:
    """``done``, ``refused: ...`` after a ValueError, or whatever else it was.

    Args:
        action: Must not need threads that were started before.
        memory: Bytes that it may map beside what is there.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.write(writing, _done(action, memory).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    start, told = time.monotonic(), b""
    while select.select([reading], [], [], max(0, start + seconds - time.monotonic()))[0]:
        part = os.read(reading, 2**16)
        told += part
        if not part:
            break
    else:
        os.kill(child, signal.SIGKILL)
        told = b"hung"
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if not told:
        return f"crashed: {os.waitstatus_to_exitcode(status)}"
    return told.decode()


def _done(action: Callable[[], object], memory: int) -> str:
    limit = psutil.Process().memory_info().vms + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        action()
    except ValueError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def mark(path: Path) -> str:
    """A shell command that leaves a mark, and so tells that it was executed."""
    return f"touch {path}"
