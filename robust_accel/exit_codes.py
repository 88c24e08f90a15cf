"""With what the command line ends, as ``sysexits.h`` has it where it has a word; 0 is success."""

import errno
import signal

NOT_FINITE = 1
"""Training met NaN or Inf and ended: one line says where. Faults of ours end so too, by Python."""
USAGE = 2
"""A recipe, an argument or data are not as they must be: one line says what."""
UNAVAILABLE = 69
"""A process of the run does not answer or is gone, or the network: one line names it."""
NO_MEMORY = 71
"""A device or the machine has no memory for so large batches."""
UNWRITABLE = 74
"""The disk is full, or a file or folder cannot be read or written, or is gone."""
STOPPED = 75
"""Ended as asked (SIGTERM, SIGUSR1, SIGHUP, ``train.max_time``): ``--resume`` goes on."""
INTERRUPTED = 130
"""The same after SIGINT."""
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""Errors by which a system says that nothing can be written."""


class Unavailable(ConnectionError):
    """A process of the run does not answer or is gone, or the network."""


class Unwritable(OSError):
    """The disk is full, or the run folder is gone or cannot be written: a sentence says which."""


class Stopped(SystemExit):
    """The run ends as it was asked to; what it has done is kept.

    Args:
        request: The signal that asked; SIGALRM is ``train.max_time``.

    Attributes:
        is_told: Whether a line has said so already, with what is kept.
    """

    code: int
    is_told = False

    def __init__(self, request: int) -> None:
        super().__init__(INTERRUPTED if request == signal.SIGINT else STOPPED)
        self.request = signal.Signals(request)

    @property
    def reason(self) -> str:
        if self.request == signal.SIGALRM:
            return "train.max_time is nearly up"
        return f"got {self.request.name}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left; without importing torch to know."""
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_torchs)
