"""The other processes of a run: one that hangs or is gone ends it, named in a sentence."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from accelerate import Accelerator

from robust_accel.comm.heartbeat import TIMEOUT, Heartbeat, is_collective_failure
from robust_accel.data import DataIdentity
from robust_accel.evaluation.ledger import told_to_all
from robust_accel.exit_codes import UNAVAILABLE, Unavailable
from robust_accel.training.stopping import Stop, Stopped


@contextmanager
def joining(timeout: float) -> Iterator[None]:
    """Around what waits for the other processes for the first time.

    Raises:
        Unavailable: They have not come.
    """
    try:
        yield
    except Exception as error:
        if not is_collective_failure(error):
            raise
        number, place = (os.environ.get(key) for key in ("WORLD_SIZE", "MASTER_ADDR"))
        raise Unavailable(
            f"not all of {number} processes have come to {place} within {timeout:.0f} s "
            f"({_cause(error)})"
        ) from error


@contextmanager
def watched(timeout: float, stop: Stop) -> Iterator[Heartbeat]:
    """Tell the others what this process does, and hear of them, in this context.

    Args:
        timeout: Seconds without progress after which a process that does not answer ends the run:
            this process exits with a sentence, wherever its main thread is.
        stop: A request to end that reaches another process ends this one in the same way.

    Raises:
        Unavailable: A collective has failed: the sentence says why.
    """
    heartbeat = Heartbeat(timeout)
    with heartbeat:
        try:
            yield heartbeat
        except Stopped as stopped:
            heartbeat.end(stopped.reason, -stopped.request)
            raise
        except Exception as error:
            if not is_collective_failure(error):
                raise
            sentence, code = "", 0
            with suppress(Stopped), stop.held():  # when one has died, the launcher ends the others
                sentence, code = heartbeat.explain()
            if code < 0:
                raise Stopped(stop.request or -code) from error
            heartbeat.end("another process is gone", UNAVAILABLE)
            raise Unavailable(f"{sentence} ({_cause(error)})") from error


@contextmanager
def together() -> Iterator[None]:
    """Join the other processes for work without steps, whose units the ledger keeps.

    A request to stop ends it at once, and one that hangs or is gone is named, as in training.
    """
    with joining(TIMEOUT):
        Accelerator()
    with Stop() as stop, watched(TIMEOUT, stop) as heartbeat:
        heartbeat.at("evaluation", 0)
        yield


def check_same_images(identity: Callable[[], DataIdentity], accelerator: Accelerator) -> None:
    """Refuse images that are not the same on all processes: one may have left out a bad one.

    Args:
        identity: Of this process; only asked for where there are others, for it takes its time.
            Every process must call this.

    Raises:
        ValueError: ``path: ...``, on all processes: which one has more, fewer or others.
    """
    if accelerator.num_processes == 1:
        return
    everywhere = told_to_all([identity()], accelerator)
    for rank, sets in enumerate(everywhere):
        for name in everywhere[0] | sets:
            found, first = (images_in_words(of.get(name)) for of in (sets, everywhere[0]))
            if found != first:
                raise ValueError(
                    f"path: process {rank} does not have the images of process 0: {name} "
                    f"{found}, not {first}"
                )


def images_in_words(about: dict[str, int | str] | None) -> str:
    if about is None:
        return "no images"
    return f"{about['images']} images (digest {str(about['digest'])[:12]})"


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
