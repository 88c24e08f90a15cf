"""Where a gradient's tensors lie: in blocks, and in the parts of a message that servers get."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robust_accel.comm.kernels import WIDE

RAW_LIMIT = 4096  # one-dimensional tensors up to this size stay fp32
# elements from which kernels of their own cost less than a copy: on a GPU a copy is almost free
LONG_RUN, LONG_RUN_ON_GPU = 1 << 17, 1 << 24


class Segment(NamedTuple):
    """One parameter tensor (or a piece of one) in a flat gradient; segments lie end to end."""

    size: int
    position: int  # of its first element in the whole model: numbers the random draws
    raw: bool  # sent as fp32


def segment(shape: Sequence[int], position: int) -> Segment:
    """Describe a parameter of this shape; biases and normalisation weights stay uncompressed."""
    size = math.prod(shape)
    return Segment(size, position, raw=len(shape) <= 1 and size <= RAW_LIMIT)


def split(segments: Sequence[Segment], parts: int, block_size: int | None) -> list[list[Segment]]:
    """Cut a gradient into `parts` contiguous chunks of nearly equal size, never inside a block.

    Where a block lies depends on its tensor alone, never on its neighbours. With `block_size=None`
    a tensor is cut like any other: a block of its own begins there.
    """
    total = sum(s.size for s in segments)
    chunks: list[list[Segment]] = [[] for _ in range(parts)]
    chunk, start = 0, 0
    for s in segments:
        unit = 1 if s.raw else block_size or 1
        done = 0
        while done < s.size:
            end = s.size
            if chunk < parts - 1:
                room = total * (chunk + 1) // parts - start
                end = min(end, max(room, 0) // unit * unit)
            if end > done:
                chunks[chunk].append(Segment(end - done, s.position + done, s.raw))
                done = end
            if done < s.size:
                chunk += 1
        start += s.size
    return chunks


class Run(NamedTuple):
    """Elements that are contiguous in both a source and a destination."""

    src: int
    dst: int
    size: int


class Piece(NamedTuple):
    """Rows that follow one another, and where they are read.

    A long block that is read in the gradient comes without the zeros that fill its last word.
    """

    rows: int
    size: int  # elements
    src: int | None  # in the flat gradient itself; None: the next of the matrix


@dataclass(frozen=True)
class Group:
    """Blocks of one size, a row each, in the gradient's order; part i has the i-th range of rows.

    A row is read in the gradient itself where many follow one another, else in a matrix.
    """

    width: int  # of a block, filled up to whole words
    rows: int
    rows_of_part: int  # the last parts have fewer, and are filled up
    position: Tensor  # [parts * rows_of_part] int32, of each block's first element in the model
    pieces: tuple[Piece, ...]
    short: tuple[Run, ...]  # from the flat gradient to the matrix, zero elsewhere
    num_short: int  # rows of that matrix

    def slabs(self, flat: Tensor, short: Tensor, size: int) -> Iterator[Tensor]:
        """Views of `flat` and `short`, of `size` elements at most: [rows, width] in all."""
        rows, taken = max(1, size // self.width), 0
        for piece in self.pieces:
            if piece.src is None:
                part, taken = short[taken : taken + piece.size], taken + piece.size
            else:
                part = flat[piece.src : piece.src + piece.size]
            yield from part.view(piece.rows, -1).split(rows)


@dataclass(frozen=True)
class Layout:
    """A gradient's raw values, and its blocks, for a number of parts."""

    num_elements: int
    parts: int
    num_raw: int
    raw: tuple[Run, ...]  # from the flat gradient to the raw values
    groups: tuple[Group, ...]  # one; with `block_size=None` one a tensor

    @property
    def raw_of_part(self) -> int:
        return -(-self.num_raw // self.parts)

    @property
    def floats_of_part(self) -> int:
        """Raw values and steps."""
        return self.raw_of_part + sum(group.rows_of_part for group in self.groups)

    @classmethod
    def of(
        cls,
        segments: Sequence[Segment],
        block_size: int | None,
        unit: int,
        parts: int,
        device: torch.device,
        chunked: bool = False,
    ) -> "Layout":
        """Lay out a gradient.

        Args:
            block_size: None: a tensor is one block, or with several parts one a part.
            unit: elements that fill whole words.
            chunked: the segments are `parts` times as many and as large ones: a part is what lies
                in one chunk of the gradient, and None makes each segment a block.
        """
        raw: list[Run] = []
        # of each group, from the flat gradient to the whole model
        members: defaultdict[int, list[Run]] = defaultdict(list)
        num_elements = num_raw = 0
        tensors = len(segments) // parts if chunked else len(segments)
        for i, s in enumerate(segments):
            if s.raw:
                raw.append(Run(num_elements, num_raw, s.size))
                num_raw += s.size
            elif s.size:
                members[i % tensors if block_size is None else 0].append(
                    Run(num_elements, s.position, s.size)
                )
            num_elements += s.size
        pieces = 1 if chunked else parts
        groups = tuple(
            _group(
                runs, block_size or round_up(-(-runs[0].size // pieces), unit), unit, parts, device
            )
            for runs in members.values()
        )
        return cls(num_elements, parts, num_raw, _merge(raw), groups)


def _group(members: list[Run], block: int, unit: int, parts: int, device: torch.device) -> Group:
    width = round_up(block, unit)
    runs: list[list[Run]] = []  # of whole blocks that follow one another, or of one that does not
    for src, position, size in members:
        whole = size // block * block if width == block else 0
        if whole:
            last = runs[-1][-1] if runs else None
            if last is None or last.src + last.size != src or last.size % block:
                runs.append([])
            runs[-1].append(Run(src, position, whole))
        if size > whole:
            runs.append([Run(src + whole, position + whole, size - whole)])
    long_run = LONG_RUN if device.type == "cpu" else LONG_RUN_ON_GPU
    pieces: list[Piece] = []
    short: list[Run] = []
    num_short = 0
    for run in runs:
        size = sum(r.size for r in run)
        rows = sum(-(-r.size // block) for r in run)
        filled = width > WIDE and rows == 1 and round_up(size, unit) == width
        if size >= long_run and (size == rows * width or filled):
            pieces.append(Piece(rows, size, run[0].src))
            continue
        for src, _, length in run:
            step = length if block == width else block  # a filled-up block ends its run
            for k in range(0, length, step):
                part = min(step, length - k)
                short.append(Run(src + k, num_short * width, part))
                num_short += -(-part // width)
        if pieces and pieces[-1].src is None:
            rows += pieces.pop().rows
        pieces.append(Piece(rows, rows * width, None))
    starts = [torch.arange(r.dst, r.dst + r.size, block) for run in runs for r in run]
    positions = torch.cat(starts)
    rows = len(positions)
    rows_of_part = -(-rows // parts)
    positions = torch.cat([positions, positions.new_zeros(parts * rows_of_part - rows)])
    positions = positions.to(torch.int32).to(device)  # wraps above 2^31
    return Group(width, rows, rows_of_part, positions, tuple(pieces), _merge(short), num_short)


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _merge(runs: list[Run]) -> tuple[Run, ...]:
    """Join runs that follow one another, so that most copies are few and long."""
    merged: list[Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        if last and (last.src + last.size, last.dst + last.size) == run[:2]:
            merged[-1] = last._replace(size=last.size + run.size)
        else:
            merged.append(run)
    return tuple(merged)
