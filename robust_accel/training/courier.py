"""Files of processes that do not see the first one's folder: machines without a common disk."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object

_CHUNK = 2**24  # bytes that are held in memory


class Courier:
    """Carries files through the process group; on one disk it carries nothing.

    Every message goes to all processes, which is simple, and more than is needed.

    Args:
        absent: Ranks of the processes that do not see the folder.
    """

    def __init__(self, accelerator: Accelerator, absent: Sequence[int]) -> None:
        self._accelerator, self._absent = accelerator, absent
        self._is_absent = accelerator.process_index in absent

    @contextmanager
    def place(self, folder: Path) -> Iterator[Path]:
        """The folder; a temporary one where it is not seen."""
        if not self._is_absent:
            yield folder
            return
        with TemporaryDirectory(prefix="robust-accel-") as name:
            yield Path(name)

    def collect(self, place: Path) -> list[str]:
        """Bring to the first process what only others have written; the names of all files."""
        self._accelerator.wait_for_everyone()  # all have written
        sizes = self._sizes(place)
        seen = [s for rank, s in enumerate(sizes) if rank not in self._absent]
        names = {name for found in seen for name in found}
        for rank in self._absent:
            for name in sorted(sizes[rank].keys() - names):
                self._carry(
                    place / name, sizes[rank][name], rank, self._accelerator.is_main_process
                )
            names |= sizes[rank].keys()
        return sorted(names)

    def hand_out(self, place: Path) -> None:
        """Bring the first process's files to those that do not see them."""
        if self._absent:
            self.bring(place, 0, self._is_absent)

    def bring(self, place: Path, sender: int, receives: bool) -> None:
        """Bring all files of one process's place to those processes that receive them."""
        for name, size in sorted(self._sizes(place)[sender].items()):
            self._carry(place / name, size, sender, receives)

    def _sizes(self, place: Path) -> list[dict[str, int]]:
        """Of the files that each process sees: on NFS, another may see its names later."""
        files = (path for path in place.rglob("*") if path.is_file())
        own = {path.relative_to(place).as_posix(): path.stat().st_size for path in files}
        return gather_object([own])

    def _carry(self, path: Path, size: int, sender: int, receives: bool) -> None:
        sends = self._accelerator.process_index == sender
        file: Any = nullcontext()
        if sends:
            file = path.open("rb")
        elif receives:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        with file:
            for start in range(0, size, _CHUNK):
                chunk = torch.empty(min(_CHUNK, size - start), dtype=torch.uint8)
                if sends:
                    file.readinto(chunk.numpy())
                chunk = broadcast(chunk.to(self._accelerator.device), from_process=sender)
                if receives:
                    file.write(chunk.cpu().numpy())
