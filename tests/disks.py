"""Disks that are full."""

import shutil
from pathlib import Path


def fill(filler: Path, left: int = 0) -> None:
    """Write a file until so many bytes are free."""
    with filler.open("wb", buffering=0) as file:
        try:
            for _ in range((shutil.disk_usage(filler.parent).free - left) // 4096):
                file.write(bytes(4096))
        except OSError:  # others wrote, too
            pass
