"""Images that ``MemoryImages`` leaves in a file: what it asks of a tensor, without the memory."""

import torch
from torch import Tensor

from robust_accel.data.array_files import FileArray


class FilePixels:
    """Images that lie in a file as [M, H, W, C], behind others that are in memory.

    Args:
        array: uint8.
        rows: Which images these are, [N]: numbers below L are those in memory, L is the file's
            first one. None: the file's.
        others: uint8, [L, C, H, W]; None: there are none.
    """

    def __init__(
        self, array: FileArray, rows: Tensor | None = None, others: Tensor | None = None
    ) -> None:
        _, height, width, channels = array.shape
        self._array = array
        none = torch.empty((0, channels, height, width), dtype=torch.uint8)
        self._others = none if others is None else others
        self._rows = torch.arange(len(array)) if rows is None else rows
        self.shape = (len(self._rows), channels, height, width)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Read some, [B, C, H, W].

        Raises:
            ValueError: ``path: ...``, see ``FileArray.rows``.
        """
        rows = self._rows[indices] - len(self._others)
        in_file = rows >= 0
        found = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8)
        found[~in_file] = self._others[rows[~in_file] + len(self._others)]
        read = torch.from_numpy(self._array.rows(rows[in_file].numpy()))
        found[in_file] = read.permute(0, 3, 1, 2)
        return found

    def subset(self, indices: Tensor) -> "FilePixels":
        return FilePixels(self._array, self._rows[indices], self._others)

    def after(self, images: Tensor) -> "FilePixels":
        """The same behind others, [L, C, H, W]."""
        rows = torch.cat([torch.arange(len(images)), len(images) + self._rows])
        return FilePixels(self._array, rows, torch.cat([images, self._others]))
