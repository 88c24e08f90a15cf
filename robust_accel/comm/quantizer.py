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

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BlockNorm = Literal["max", "l2"]

RAW_LIMIT = 4096  # one-dimensional tensors up to this size stay fp32
FUSE_LIMIT = 1 << 16  # elements from which `compile="auto"` fuses
LONG_RUN = 1 << 17  # elements from which a call (0.2 ms if compiled) costs less than a copy
EAGER_SLAB = 1 << 16  # elements that eager code handles at a time, so that they stay in cache
MAX_UNROLL = 8  # messages that one kernel adds up
TINY = 2.0**-126  # the smallest step: its reciprocal is still a normal number
Plane: TypeAlias = tuple[Tensor, Tensor]  # steps [rows] fp32, words [rows, row_words] int32
_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1


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


# ---------------------------------------------------------------------------- random numbers


def random_key(seed: int, stream: int, step: int, device: torch.device) -> Tensor:
    """Two int32 words that select one sequence of draws. key: [2]."""
    word = 0
    for value in (seed, stream, step):
        word = _mix64((word + value) & _MASK64)
    # filled on the device: a copy from the host would wait for the stream
    words = (word & _MASK32, word >> 32)
    return torch.cat([torch.full((1,), _int32(w), dtype=torch.int32, device=device) for w in words])


def _mix64(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _int32(x: int) -> int:
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


def _mix32(x: Tensor) -> Tensor:
    """One round of the 32-bit mixer `lowbias32`. x: int32, which wraps."""
    # `>>` keeps the sign, so the shifted-in bits are masked away
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    return x ^ ((x >> 15) & 0x1FFFF)


def row_seeds(row_position: Tensor, key: Tensor) -> Tensor:
    """Where each block's sequence of draws starts. row_position: [rows] int32, key: [2] int32."""
    x = _mix32(row_position + key[0]) + key[1]
    return _mix32(_mix32(x * _int32(0x846CA68B)))


def uniform_pair(seeds: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Draws in (0, 1) with 16 bits, two from a hash. seeds: [rows] -> two of [rows, size]."""
    column = torch.arange(size, dtype=torch.int32, device=seeds.device)
    weyl = column * _int32(0x9E3779B9) + _int32(start * 0x9E3779B9 & _MASK32)
    hashed = _mix32(seeds[:, None] + weyl)
    # in the middle of each interval: the mean is exactly 1/2
    low = ((hashed & 0xFFFF).to(torch.float32) + 0.5) * 2.0**-16
    high = (((hashed >> 16) & 0xFFFF).to(torch.float32) + 0.5) * 2.0**-16
    return low, high


# ---------------------------------------------------------------------------- blocks to words


def num_levels(bits: int, norm: BlockNorm) -> int:
    """s: max norm keeps the sign in the code (2s + 1 <= 2^b); (A5) sends it apart (s = 2^b)."""
    return 2**bits if norm == "l2" else 2 ** (bits - 1) - 1


def block_norm(x: Tensor, norm: BlockNorm) -> Tensor:
    """Norm of each block; NaN or Inf where the block holds one. x: [rows, width] -> [rows]."""
    largest = x.abs().amax(dim=1)
    if norm == "max":
        return largest
    # relative to the largest entry: squares of fp32 overflow above 1e19 and vanish below 1e-23
    ok = (largest > 0) & torch.isfinite(largest)
    relative = x / torch.where(ok, largest, 1.0)[:, None]
    return torch.where(ok, largest * relative.square().sum(dim=1).sqrt(), largest)


def encode_blocks(x: Tensor, seeds: Tensor, words: Tensor, *, bits: int, norm: BlockNorm) -> Tensor:
    """Quantise blocks by (A5)-(A6).

    Args:
        x: [rows, width] fp32.
        seeds: [rows] int32, from `row_seeds`.
        words: [rows, row_words] int32, filled by this function.

    Returns:
        steps [rows]: scale / s; NaN where the block holds NaN or Inf, so that every rank sees it.
    """
    s, parts, width = num_levels(bits, norm), 32 // bits, x.shape[1]
    scale = block_norm(x, norm)
    step = torch.where(torch.isfinite(scale), (scale / s).clamp(min=TINY), torch.nan)
    # a hair more, that the largest entry reaches level s in spite of fp32's rounding
    inverse = ((1 + 2.0**-22) / step)[:, None]
    levels: list[Tensor] = []  # [rows, width / parts] int32 in [-s, s]
    for i, part in enumerate(x.view(-1, parts, width // parts).unbind(1)):
        if i % 2 == 0:
            draws = uniform_pair(seeds, i * (width // parts), width // parts)
        # floor of a signed x has the law of (A6), which rounds |x|; the sum's own rounding to 24
        # bits is below that of x
        level = (part * inverse + draws[i % 2]).floor().to(torch.int32)
        levels.append(level.clamp(-s, s))
    if norm == "max":
        words.copy_(pack([level + s for level in levels], bits))
        return step
    # b bits and a sign hold -s..s-1 and (A6) also reaches +s. Only an entry above (s - 1) / s of
    # the norm can, hence at most one in a block: then the whole block changes sign, and the step.
    q = torch.stack(levels, dim=1).view(-1, width)
    top = (q == s).any(dim=1)
    codes = torch.where(top[:, None], -q, q) + s  # [rows, width] in [0, 2s)
    low, high = codes & (s - 1), codes >> bits
    low_words = pack(low.view(-1, parts, width // parts).unbind(1), bits)
    high_words = pack(high.view(-1, 32, width // 32).unbind(1), 1)
    words.copy_(torch.cat([low_words, high_words], dim=1))
    return torch.where(top, -step, step)


def decode_blocks(
    planes: Sequence[Plane],
    out: Tensor,
    add: bool,
    divisor: int,
    *,
    bits: int,
    norm: BlockNorm,
) -> None:
    """Sum planes in order onto `out` [rows, width] (if `add`), then divide.

    An element is one multiplication, hence the same bits everywhere; a poisoned block is all NaN.
    """
    s, n = num_levels(bits, norm), out.shape[1] * bits // 32
    total = out if add else None
    for step, words in planes:
        codes = unpack(words[:, :n], bits)
        if norm == "l2":
            codes = codes + (unpack(words[:, n:], 1) << bits)
        value = (codes - s).to(torch.float32) * step[:, None]
        total = value if total is None else total + value
    assert total is not None
    out.copy_(total if divisor == 1 else total * (1.0 / divisor))


def pack(parts: Sequence[Tensor], bits: int) -> Tensor:
    """32 / bits matrices of codes below 2^bits, [rows, n] int32 each -> words [rows, n]."""
    words = parts[0]
    for i, codes in enumerate(parts[1:], start=1):
        words = words | (codes << (i * bits))
    return words


def unpack(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: [rows, n] int32 -> codes [rows, n * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = (words[:, None, :] >> shifts[:, None]) & (2**bits - 1)
    return codes.view(-1, words.shape[1] * (32 // bits))


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
    row_position: Tensor  # [rows] int32
    long: tuple[_Run, ...]  # from the flat gradient to the first rows
    short: tuple[_Run, ...]  # from the flat gradient to the matrix, zero elsewhere
    num_short: int  # rows of that matrix

    def slabs(self, flat: Tensor, short: Tensor, slab: int) -> list[Tensor]:
        """Views of `flat` and `short`, at most `slab` rows each: [rows, width] in all."""
        parts = [flat[src : src + size] for src, _, size in self.long]
        if self.num_short:
            parts.append(short)
        return [x for part in parts for x in part.view(-1, self.width).split(slab)]


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
    row_position = torch.cat(starts).to(torch.int32).to(device)  # wraps above 2^31
    return _Group(width, len(row_position), row_position, long_rows, short_rows, num_short)


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


# ---------------------------------------------------------------------------- eager or compiled

_Encode = Callable[[Tensor, Tensor, Tensor], Tensor]
_Decode = Callable[[Sequence[Plane], Tensor, bool, int], None]


def _eager(bits: int, norm: BlockNorm) -> tuple[_Encode, _Decode]:
    return partial(encode_blocks, bits=bits, norm=norm), partial(
        decode_blocks, bits=bits, norm=norm
    )


@lru_cache(maxsize=None)  # noqa: UP033  one a format and kind of device
@torch.no_grad()  # as where the kernels are called: torch compiles anew for each grad mode
def _fused(bits: int, width: int, device_type: str) -> tuple[_Encode, _Decode] | None:
    """The kernels for `norm="max"` fused by torch.compile; None, said once, where that fails."""

    # not the partials: torch would count them all as one function that compiles again and again
    def plain_encode(x: Tensor, seeds: Tensor, words: Tensor) -> Tensor:
        return encode_blocks(x, seeds, words, bits=bits, norm="max")

    def plain_decode(planes: Sequence[Plane], out: Tensor, add: bool, divisor: int) -> None:
        decode_blocks(planes, out, add, divisor, bits=bits, norm="max")

    def encode(x: Tensor, seeds: Tensor, words: Tensor) -> Tensor:
        if len(x) == 1:
            return plain_encode(x, seeds, words)  # a size of 1 would be compiled on its own
        _any_rows(x, seeds, words)
        return fast_encode(x, seeds, words)

    def decode(planes: Sequence[Plane], out: Tensor, add: bool, divisor: int) -> None:
        if len(out) == 1:
            return plain_decode(planes, out, add, divisor)
        _any_rows(out, *(t for plane in planes for t in plane))
        return fast_decode(planes, out, add, divisor)

    try:
        # static but for the number of rows: the sizes of the inner loops become constants
        fast_encode = torch.compile(plain_encode, dynamic=False)
        fast_decode = torch.compile(plain_decode, dynamic=False)
        # at the size of most calls, for which the compiler then tunes
        x = torch.zeros(2 + LONG_RUN // width, width, device=torch.device(device_type))
        seeds = torch.zeros(len(x), dtype=torch.int32, device=x.device)
        words = seeds.new_empty(len(x), width * bits // 32)
        decode([(encode(x, seeds, words), words)], x, False, 1)
    except Exception as error:  # torch raises a different class for each missing tool
        _say_eager(str(error))
        return None
    return encode, decode


def _any_rows(*tensors: Tensor) -> None:
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 0)


@lru_cache(maxsize=None)  # noqa: UP033  once a reason
def _say_eager(reason: str) -> None:
    logger.warning("torch.compile failed, gradients are quantised in eager mode: %s", reason)


# ---------------------------------------------------------------------------- the quantiser


@dataclass(frozen=True)
class Quantizer:
    """Block-wise stochastic quantiser of a flat fp32 gradient.

    Args:
        bits: 16, 8, 4 or 2.
        norm: "max" divides a block by its largest magnitude; "l2" is (A5), sign sent apart.
        block_size: elements a block; blocks never straddle segments. None: one block a segment.
        compile: fuse the arithmetic of "max" with torch.compile, to the same bytes; "auto" does
            so for at least `FUSE_LIMIT` elements. Eager where there is no compiler.

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
            kernel, _, slab = self._kernels(layout, group.width, flat.device)
            seeds, row = row_seeds(group.row_position, key), 0
            short = flat.new_zeros(group.num_short * group.width)
            _gather(flat, group.short, short)
            for x in group.slabs(flat, short, slab):
                rows = slice(row, row + len(x))
                steps[rows] = kernel(x, seeds[rows], words[rows])
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
            _, kernel, slab = self._kernels(layout, group.width, out.device)
            short, row = out.new_empty(group.num_short * group.width), 0
            for y in group.slabs(out, short, slab):
                rows = slice(row, row + len(y))
                for m in range(0, len(sources), MAX_UNROLL):
                    part = [(s[rows], w[rows]) for s, w in sources[m : m + MAX_UNROLL]]
                    last = m + MAX_UNROLL >= len(sources)
                    kernel(part, y, m > 0, len(sources) if last else 1)
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

    def _kernels(
        self, layout: _Layout, width: int, device: torch.device
    ) -> tuple[_Encode, _Decode, int]:
        """Encode and decode, and the number of rows that one call should handle."""
        fuse = layout.num_elements >= FUSE_LIMIT if self.compile == "auto" else self.compile
        if fuse and self.norm == "max" and (fused := _fused(self.bits, width, device.type)):
            return *fused, max(1, layout.num_elements)
        return *_eager(self.bits, self.norm), max(1, EAGER_SLAB // width)


def _mean(raws: Sequence[Tensor]) -> Tensor:
    total = raws[0].clone()
    for raw in raws[1:]:
        total += raw
    return total if len(raws) == 1 else total.mul_(1.0 / len(raws))
