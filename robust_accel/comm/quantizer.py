"""A flat gradient to bytes and back, unbiased: pure tensor code that never sees a process group.

One message is 32-bit words in this order (all ranks know the sizes, so there is no header):

    raw      fp32, one an element    tensors that `segment` leaves uncompressed
    steps    fp32, one a block       the distance between two levels
    codes    `bits` an element       block by block, a tensor's last one filled up with zeros;
                                     a block of n words holds in bits [i b, (i + 1) b) of its word j
                                     element i n + j, so that whole vectors are packed at a time
    signs    1 bit an element        only for `norm="l2"`: packed likewise, after a block's codes

With `block_size=None` every tensor is one block: its step and codes, then the next tensor's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from robust_accel.comm.kernels import MAX_UNROLL, BlockNorm, Eager, Kernels, Plane, fused

RAW_LIMIT = 4096  # one-dimensional tensors up to this size stay fp32
FUSE_LIMIT = 1 << 16  # elements from which `compile="auto"` fuses
LONG_RUN = 1 << 17  # elements from which calls of their own cost less than a copy


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
    """Cut the gradient into `parts` contiguous chunks of nearly equal size, never inside a block.

    With `block_size=None` a block is first made 1/parts of its tensor, so that no chunk carries a
    whole one. Where a block lies depends on its tensor alone, never on its neighbours.
    """
    if block_size is None:
        segments = [piece for s in segments for piece in _pieces(s, -(-s.size // parts))]
    total = sum(s.size for s in segments)
    chunks: list[list[Segment]] = [[] for _ in range(parts)]
    chunk, start = 0, 0
    for s in segments:
        unit = 1 if s.raw else block_size or max(s.size, 1)
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


def _pieces(s: Segment, size: int) -> list[Segment]:
    starts = range(0, s.size, max(size, 1))
    return [Segment(min(size, s.size - i), s.position + i, s.raw) for i in starts]


# ---------------------------------------------------------------------------- layout


class _Run(NamedTuple):
    """Elements that are contiguous in both a source and a destination."""

    src: int
    dst: int
    size: int


@dataclass(frozen=True)
class _Group:
    """Blocks of one size: rows of long runs, which are read in place, then a matrix of the rest."""

    width: int  # of a block, filled up to whole words
    rows: int
    position: Tensor  # [rows] int32
    long: tuple[_Run, ...]  # from the flat gradient to the first rows
    short: tuple[_Run, ...]  # from the flat gradient to the matrix, zero elsewhere
    num_short: int  # rows of that matrix

    def slabs(self, flat: Tensor, short: Tensor, size: int) -> list[Tensor]:
        """Views of `flat` and `short`, of `size` elements at most: [rows, width] in all."""
        parts = [flat[src : src + length] for src, _, length in self.long]
        if self.num_short:
            parts.append(short)
        rows = max(1, size // self.width)
        return [x for part in parts for x in part.view(-1, self.width).split(rows)]


@dataclass(frozen=True)
class _Layout:
    num_elements: int
    num_raw: int
    raw: tuple[_Run, ...]  # from the flat gradient to the message's raw values
    groups: tuple[_Group, ...]


@lru_cache(maxsize=1024)  # one a bucket (and chunk) of the model
def _layout(
    segments: tuple[Segment, ...], block_size: int | None, unit: int, device: torch.device
) -> _Layout:
    raw: list[_Run] = []
    members: list[list[_Run]] = []  # of each group, from the flat gradient to the whole model
    num_elements = num_raw = 0
    for s in segments:
        if s.raw:
            raw.append(_Run(num_elements, num_raw, s.size))
            num_raw += s.size
        elif s.size:
            if block_size is None or not members:
                members.append([])
            members[-1].append(_Run(num_elements, s.position, s.size))
        num_elements += s.size
    groups = tuple(_group(m, block_size or m[0].size, unit, device) for m in members)
    return _Layout(num_elements, num_raw, _merge(raw), groups)


def _group(members: list[_Run], block: int, unit: int, device: torch.device) -> _Group:
    width = _round_up(block, unit)
    runs: list[list[_Run]] = []  # whole blocks that follow one another in the gradient
    tails: list[_Run] = []
    for src, position, size in members:
        whole = size // block * block if width == block else 0
        if whole:
            if not runs or runs[-1][-1].src + runs[-1][-1].size != src:
                runs.append([])
            runs[-1].append(_Run(src, position, whole))
        if size > whole:
            tails.append(_Run(src + whole, position + whole, size - whole))
    long = [p for run in runs for p in run if sum(q.size for q in run) >= LONG_RUN]
    short = [p for run in runs for p in run if sum(q.size for q in run) < LONG_RUN] + tails
    long_rows, _ = _rows(long, block, width)
    short_rows, num_short = _rows(short, block, width)
    starts = [torch.arange(p.dst, p.dst + p.size, block) for p in long + short]
    positions = torch.cat(starts).to(torch.int32).to(device)  # wraps above 2^31
    return _Group(width, len(positions), positions, long_rows, short_rows, num_short)


def _rows(pieces: list[_Run], block: int, width: int) -> tuple[tuple[_Run, ...], int]:
    """Place pieces of the gradient in a matrix [rows, width], a block a row; and count its rows."""
    runs: list[_Run] = []
    rows = 0
    for src, _, size in pieces:
        length = size if block == width else block  # a filled-up block ends its run
        for i in range(0, size, length):
            runs.append(_Run(src + i, rows * width, min(length, size - i)))
            rows += -(-min(length, size - i) // width)
    return _merge(runs), rows


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _merge(runs: list[_Run]) -> tuple[_Run, ...]:
    """Join runs that follow one another, so that most copies are few and long."""
    merged: list[_Run] = []
    for run in runs:
        last = merged[-1] if merged else None
        if last and (last.src + last.size, last.dst + last.size) == run[:2]:
            merged[-1] = last._replace(size=last.size + run.size)
        else:
            merged.append(run)
    return tuple(merged)


def _gather(source: Tensor, runs: tuple[_Run, ...], out: Tensor) -> None:
    for src, dst, n in runs:
        out[dst : dst + n] = source[src : src + n]


def _scatter(source: Tensor, runs: tuple[_Run, ...], out: Tensor) -> None:
    """Copy runs back from where `_gather` put them."""
    for src, dst, n in runs:
        out[src : src + n] = source[dst : dst + n]


# ---------------------------------------------------------------------------- the quantiser


@dataclass(frozen=True)
class Quantizer:
    """Block-wise stochastic quantiser of a flat fp32 gradient.

    Args:
        bits: 16, 8, 4 or 2.
        norm: "max" divides a block by its largest magnitude; "l2" is (A5), sign sent apart.
        block_size: elements a block; blocks never straddle segments. None: one block a segment.
        compile: fuse the arithmetic of "max" with torch.compile, to the same bytes (torch 2.6
            rounds an element in some thousands otherwise); "auto" does so for at least `FUSE_LIMIT`
            elements. Eager where there is no compiler.

    Source: equations (A5)-(A6) of DAT, arXiv 2206.06257. They take one L2 norm over the whole
    vector: that is `norm="l2"`, `block_size=None` and a single segment. The default differs, as
    the error then grows with the square root of the vector's length. Also, the step between levels
    is sent and not the norm, so that to decode is one multiplication.
    """

    bits: int = 8
    norm: BlockNorm = "max"
    block_size: int | None = 256
    compile: bool | Literal["auto"] = "auto"

    def num_bytes(self, segments: Sequence[Segment]) -> int:
        """Size of a message, a multiple of 4."""
        num_words = 0
        for s in segments:
            block = self.block_size or max(s.size, 1)
            num_words += s.size if s.raw else -(-s.size // block) * (1 + self._row_words(block))
        return 4 * num_words

    @torch.no_grad()
    def encode(
        self, flat: Tensor, segments: Sequence[Segment], key: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Quantise a gradient.

        Args:
            flat: [d] fp32, contiguous.
            segments: the tensors that lie end to end in `flat`.
            key: [2] int32, from `random_key`.
            out: [num_bytes(segments)] uint8, 4-byte aligned, to be filled; None makes one.

        Returns:
            The message, [num_bytes(segments)] uint8.
        """
        layout = self._layout(segments, flat.device)
        assert flat.dtype == torch.float32
        assert flat.shape == (layout.num_elements,)
        if out is None:
            out = flat.new_empty(self.num_bytes(segments), dtype=torch.uint8)
        if not layout.num_elements:
            return out  # an empty slice may be misaligned
        raw, planes = self._planes(out, layout)
        _gather(flat, layout.raw, raw)
        for group, (steps, words) in zip(layout.groups, planes, strict=True):
            kernels, row = self._kernels(layout, group.width, flat.device), 0
            short = flat.new_zeros(group.num_short * group.width)
            _gather(flat, group.short, short)
            for x in group.slabs(flat, short, kernels.slab):
                rows = slice(row, row + len(x))
                kernels.encode(x, group.position[rows], key, (steps[rows], words[rows]))
                row += len(x)
        return out

    def decode(
        self, message: Tensor, segments: Sequence[Segment], out: Tensor | None = None
    ) -> Tensor:
        """message: [num_bytes(segments)] uint8, 4-byte aligned -> [d] fp32, `out` where given."""
        return self.mean(message[None], segments, out)

    @torch.no_grad()
    def mean(
        self, messages: Tensor, segments: Sequence[Segment], out: Tensor | None = None
    ) -> Tensor:
        """Decode and average messages, summed in their order.

        Args:
            messages: [M, num_bytes(segments)] uint8, 4-byte aligned.
            out: [d] fp32, to be filled; None makes one.

        Returns:
            [d] fp32; the same bits wherever it is computed.
        """
        layout = self._layout(segments, messages.device)
        assert messages.shape[1] == self.num_bytes(segments)
        if out is None:
            out = messages.new_empty(layout.num_elements, dtype=torch.float32)
        if not layout.num_elements:
            return out
        raws, planes = zip(*(self._planes(m, layout) for m in messages), strict=True)
        _scatter(_mean(raws), layout.raw, out)
        for group, *sources in zip(layout.groups, *planes, strict=True):
            kernels = self._kernels(layout, group.width, out.device)
            short, row = out.new_empty(group.num_short * group.width), 0
            for y in group.slabs(out, short, kernels.slab):
                rows = slice(row, row + len(y))
                for m in range(0, len(sources), MAX_UNROLL):
                    part = [(s[rows], w[rows]) for s, w in sources[m : m + MAX_UNROLL]]
                    last = m + MAX_UNROLL >= len(sources)
                    kernels.decode(part, y, m > 0, len(sources) if last else 1)
                row += len(y)
            _scatter(short, group.short, out)
        return out

    @property
    def _unit(self) -> int:
        """Elements that fill whole words of codes, and of signs."""
        return 32 if self.norm == "l2" else 32 // self.bits

    def _row_words(self, block: int) -> int:
        return _round_up(block, self._unit) * (self.bits + (self.norm == "l2")) // 32

    def _layout(self, segments: Sequence[Segment], device: torch.device) -> _Layout:
        return _layout(tuple(segments), self.block_size, self._unit, device)

    def _planes(self, message: Tensor, layout: _Layout) -> tuple[Tensor, list[Plane]]:
        """Views of a message [num_bytes]: its raw values, and the plane of each group."""
        floats, ints = message.view(torch.float32), message.view(torch.int32)
        planes = []
        start = layout.num_raw
        for group in layout.groups:
            end = start + group.rows
            stop = end + group.rows * self._row_words(group.width)
            planes.append((floats[start:end], ints[end:stop].view(group.rows, -1)))
            start = stop
        return floats[: layout.num_raw], planes

    def _kernels(self, layout: _Layout, width: int, device: torch.device) -> Kernels:
        fuse = layout.num_elements >= FUSE_LIMIT if self.compile == "auto" else self.compile
        kernels = None
        if fuse and self.norm == "max":
            kernels = fused(self.bits, width, device, torch.get_num_threads())
        return kernels or Eager(self.bits, self.norm)


def _mean(raws: Sequence[Tensor]) -> Tensor:
    total = raws[0].clone()
    for raw in raws[1:]:
        total += raw
    return total if len(raws) == 1 else total.mul_(1.0 / len(raws))
