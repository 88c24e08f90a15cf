"""The first process decides, and tells the others; it owns the folder that they write."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from robust_accel.locks import OWNER, locked
from robust_accel.run_folder import RunFolder

logger = logging.getLogger(__name__)

Decided = TypeVar("Decided")


def decided(decide: Callable[[], Decided], accelerator: Accelerator) -> Decided:
    """What the first process finds, on all processes; what it raises, all raise."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except Exception as raised:
            outcome[1] = raised
    found, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return found


@contextmanager
def owned(folder: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """Keep all other runs out of a folder, and find out which processes see it.

    Those that do not (``folder.absent``: on machines that do not share its disk) get what they need
    of it from the first process, and write nothing.

    Raises:
        ValueError: On all processes: another run owns it, or it cannot be written to.
    """
    with ExitStack() as stack:
        text = decided(lambda: stack.enter_context(locked(folder.path)), accelerator)
        try:
            is_seen = (folder.path / OWNER).read_text() == text
        except OSError:
            is_seen = False
        seen = gather_object([is_seen])
        folder.absent = tuple(rank for rank, sees in enumerate(seen) if not sees)
        if folder.absent:
            ranks = ", ".join(map(str, folder.absent))
            logger.info(
                "%s is not on a disk of processes %s: process 0 keeps their files",
                folder.path,
                ranks,
            )
        yield
