"""What a terminal shows of what is logged, and whether it shows progress bars."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from robust_accel.messages import printable

LEVELS = ("debug", "info", "warning", "error")
_ours = logging.getLogger("robust_accel")


def is_main() -> bool:
    """Whether this is the one of the launcher's processes that speaks, and has written last."""
    return os.environ.get("RANK", "0") == "0"


def shows_bars() -> bool:
    """Whether this process draws progress bars: where somebody sees them, unless ``robust_accel``
    logs warnings only."""
    is_seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    return is_main() and is_seen and _ours.level <= logging.INFO


@contextmanager
def shown(level: str) -> Iterator[None]:
    """Show what is logged from this level on, and bars, in a block.

    Lines go to standard output, warnings to standard error, of the first process only; errors of
    all, and what is marked as ``of_one_process``. What a wrapped script shows of ``logging`` does
    not show them twice. A library's user chooses by ``logging`` instead.
    """
    handler, before = _Console(), (_ours.level, _ours.propagate)
    _ours.addHandler(handler)
    _ours.setLevel(level.upper())
    _ours.propagate = False
    try:
        yield
    finally:
        _ours.removeHandler(handler)
        _ours.setLevel(before[0])
        _ours.propagate = before[1]


class _Console(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """A line, above the bars if there are any; what a stranger's file has said is printable."""
        is_warning = record.levelno >= logging.WARNING
        speaks = is_main() or getattr(record, "of_one_process", False)
        if not speaks and record.levelno < logging.ERROR:
            return
        try:
            text, file = printable(self.format(record)), sys.stderr if is_warning else sys.stdout
            if "tqdm" in sys.modules:
                sys.modules["tqdm"].tqdm.write(text, file=file)
            else:
                print(text, file=file)
            file.flush()
        except Exception:
            self.handleError(record)
