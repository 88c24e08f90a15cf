"""The commands: each checks what it was given and calls the parts below."""

import os
import sys
from typing import TextIO


def say(text: str, file: TextIO | None = None) -> None:
    """Print from one of the processes that the launcher has started."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=file or sys.stdout, flush=True)


def is_setting(argument: str) -> bool:
    """Whether a word of the command line is ``key.subkey=value``."""
    return "=" in argument and not argument.startswith("-")
