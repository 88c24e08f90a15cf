"""The commands: each checks what it was given and calls the parts below."""

import os
import sys
from typing import TextIO


def is_main() -> bool:
    """Whether this is the one of the launcher's processes that speaks, and has written last."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str, file: TextIO | None = None) -> None:
    """Print from that process."""
    if is_main():
        print(text, file=file or sys.stdout, flush=True)


def is_setting(argument: str) -> bool:
    """Whether a word of the command line is ``key.subkey=value``."""
    return "=" in argument and not argument.startswith("-")
