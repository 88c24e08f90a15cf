"""A flat gradient to bytes and back, unbiased: pure tensor code that never sees a process group.

One message holds, in this order (all ranks know the sizes, so there is no header):

    raw      fp32, one an element    tensors that `segment` leaves uncompressed
    scales   fp32, one a block       the block's norm
    codes    `bits` an element       levels; low bits first within a byte
    signs    1 bit an element        only for `norm="l2"`
    padding  to a multiple of 4      so that messages laid end to end stay fp32-aligned
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BlockNorm = Literal["max", "l2"]

RAW_LIMIT = 4096  # one-dimensional tensors up to this size stay fp32
SLAB = 1 << 16  # elements that eager code handles at a time, so that temporaries stay in cache
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


def uniform(position: Tensor, key: Tensor) -> Tensor:
    """A number in [0, 1) for each position, by hashing. position: [...] int32; key: [2] int32.

    Source: the 32-bit mixer `lowbias32`, with half of the key added between its two rounds.
    """
    # int32 wraps; `>>` keeps the sign, so the shifted-in bits are masked away
    x = position + key[0]
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = x + key[1]
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _int32(0x846CA68B)
    x = x ^ ((x >> 16) & 0xFFFF)
    return ((x >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


# ---------------------------------------------------------------------------- blocks to codes


def num_levels(bits: int, norm: BlockNorm) -> int:
    """s: max norm keeps the sign in the code (2s + 1 <= 2^b); (A5) sends it apart (s = 2^b)."""
    return 2**bits if norm == "l2" else 2 ** (bits - 1) - 1


def code_dtype(bits: int) -> torch.dtype:
    return torch.int16 if bits == 16 else torch.uint8


def block_scale(x: Tensor, norm: BlockNorm) -> Tensor:
    """Norm of each block; NaN or Inf where the block holds one. x: [rows, block] -> [rows, 1]."""
    largest = x.abs().amax(dim=1, keepdim=True)
    if norm == "max":
        return largest
    # relative to the largest entry: squares of fp32 overflow above 1e19 and vanish below 1e-23
    ok = (largest > 0) & torch.isfinite(largest)
    relative = x / torch.where(ok, largest, 1.0)
    return torch.where(ok, largest * (relative * relative).sum(dim=1, keepdim=True).sqrt(), largest)


def stochastic_levels(x: Tensor, scale: Tensor, u: Tensor, s: int) -> Tensor:
    """(A6): x / scale * s, rounded down or up at random. x, u: [rows, block] -> integers, fp32.

    Rounding towards minus infinity with a signed x has the law of (A6), which rounds |x|.
    """
    ok = (scale > 0) & torch.isfinite(scale)  # a zero or poisoned block has no level but 0
    t = torch.where(ok, x / torch.where(ok, scale, 1.0) * s, 0.0)
    low = t.floor()
    # compared, not floor(t + u): the sum would be rounded to fp32's 24 bits
    return (low + (u < t - low).to(torch.float32)).clamp(-s, s)


def encode_blocks(
    x: Tensor, row_position: Tensor, key: Tensor, bits: int, norm: BlockNorm
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Quantise blocks by (A5)-(A6).

    Args:
        x: [rows, block] fp32.
        row_position: [rows] int32, the position of each row's first element.
        key: [2] int32, from `random_key`.

    Returns:
        codes [rows, block] uint8 or int16, signs [rows, block] bool (only l2), scales [rows].
    """
    s = num_levels(bits, norm)
    scale = block_scale(x, norm)
    column = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
    q = stochastic_levels(x, scale, uniform(row_position[:, None] + column, key), s)
    if norm == "max":
        codes = q if bits == 16 else q + s
        return codes.to(code_dtype(bits)), None, scale[:, 0]
    # b bits hold the levels 0..s-1 and (A6) also reaches s. Only an entry above (s - 1) / s of the
    # norm can, hence at most one in a block: "-0" marks it and its sign goes into the scale's.
    top = q.abs() == s
    magnitude = torch.where(top, 0.0, q.abs()) - (32768 if bits == 16 else 0)
    scale = torch.where((q == -s).any(dim=1, keepdim=True), -scale, scale)
    return magnitude.to(code_dtype(bits)), (q < 0) | top, scale[:, 0]


def decode_blocks(
    codes: Tensor, signs: Tensor | None, scales: Tensor, bits: int, norm: BlockNorm
) -> Tensor:
    """Inverse of `encode_blocks`: [rows, block] fp32; a poisoned block is non-finite throughout."""
    s = num_levels(bits, norm)
    scale = scales[:, None]
    q = codes.to(torch.float32)
    if signs is None:
        return (q if bits == 16 else q - s) / s * scale
    q = q + 32768 if bits == 16 else q
    q = torch.where(signs, torch.where(q == 0, torch.where(scale < 0, -s, s), -q), q)
    return q / s * scale.abs()


# ---------------------------------------------------------------------------- codes to bytes


def packed_size(num_codes: int, bits: int) -> int:
    return -(-num_codes * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits (int16 at 16 bits) to bytes. codes: [n] -> [packed_size(n)] uint8."""
    if bits >= 8:
        return codes.view(torch.uint8)
    per_byte = 8 // bits
    short = -codes.numel() % per_byte
    if short:
        codes = torch.cat([codes, codes.new_zeros(short)])
    columns = codes.to(torch.uint8).view(codes.numel() // per_byte, per_byte)
    packed = columns[:, 0].clone()
    for i in range(1, per_byte):
        packed |= columns[:, i] << (i * bits)
    return packed


def unpack(packed: Tensor, num_codes: int, bits: int) -> Tensor:
    """Inverse of `pack`: [num_codes]."""
    if bits >= 8:
        return packed.view(code_dtype(bits))
    columns = [(packed >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.stack(columns, dim=1).view(-1)[:num_codes]


# ---------------------------------------------------------------------------- layout


class _Run(NamedTuple):
    """Elements that are contiguous in both a source and a destination."""

    src: int
    dst: int
    size: int


@dataclass(frozen=True)
class _Batch:
    """Blocks of one size, quantised together as a matrix [rows, block]."""

    block: int
    rows: int
    first_row: int  # where its scales begin in the message
    row_position: Tensor  # [rows] int32
    values: tuple[_Run, ...]  # from the flat gradient to the matrix
    codes: tuple[_Run, ...]  # from the message's codes to the matrix


@dataclass(frozen=True)
class _Layout:
    num_elements: int
    num_raw: int
    num_codes: int
    num_scales: int
    raw: tuple[_Run, ...]  # from the flat gradient to the message's raw values
    batches: tuple[_Batch, ...]


@lru_cache(maxsize=1024)  # one a bucket (and chunk) of the model
def _layout(segments: tuple[Segment, ...], block_size: int | None, device: torch.device) -> _Layout:
    raw: list[_Run] = []
    groups: list[tuple[int, list[tuple[Segment, int, int]]]] = []  # block, (segment, flat, code)
    num_elements = num_raw = num_codes = 0
    for s in segments:
        if s.raw:
            raw.append(_Run(num_elements, num_raw, s.size))
            num_raw += s.size
        elif s.size:
            if block_size is None or not groups:
                groups.append((block_size or s.size, []))
            groups[-1][1].append((s, num_elements, num_codes))
            num_codes += s.size
        num_elements += s.size
    batches: list[_Batch] = []
    num_scales = 0
    for block, members in groups:
        batches.append(_batch(block, members, num_scales, device))
        num_scales += batches[-1].rows
    return _Layout(num_elements, num_raw, num_codes, num_scales, _merge(raw), tuple(batches))


def _batch(
    block: int, members: list[tuple[Segment, int, int]], first_row: int, device: torch.device
) -> _Batch:
    values: list[_Run] = []
    codes: list[_Run] = []
    positions: list[Tensor] = []
    rows = 0
    for s, flat, code in members:
        values.append(_Run(flat, rows * block, s.size))
        codes.append(_Run(code, rows * block, s.size))
        positions.append(torch.arange(s.position, s.position + s.size, block))
        rows += -(-s.size // block)
    row_position = torch.cat(positions).to(torch.int32).to(device)  # wraps above 2^31
    return _Batch(block, rows, first_row, row_position, _merge(values), _merge(codes))


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


def _gather(source: Tensor, runs: tuple[_Run, ...], size: int) -> Tensor:
    """Copy runs into a vector of `size`, zero elsewhere; a view where one run fills it."""
    if len(runs) == 1 and runs[0].size == size:
        return source[runs[0].src : runs[0].src + size]
    out = source.new_zeros(size)
    for src, dst, n in runs:
        out[dst : dst + n] = source[src : src + n]
    return out


def _scatter(matrix: Tensor, runs: tuple[_Run, ...], out: Tensor) -> None:
    """Copy runs back from where `_gather` put them."""
    for src, dst, n in runs:
        out[src : src + n] = matrix[dst : dst + n]


# ---------------------------------------------------------------------------- the quantiser


@dataclass(frozen=True)
class Quantizer:
    """Block-wise stochastic quantiser of a flat fp32 gradient.

    Args:
        bits: 16, 8, 4 or 2.
        norm: "max" divides a block by its largest magnitude; "l2" is (A5), sign sent apart.
        block_size: elements a block; blocks never straddle segments. None: one block a segment.
        compile: fuse the arithmetic with torch.compile; eager where there is no compiler.

    Source: equations (A5)-(A6) of DAT, arXiv 2206.06257. They take one L2 norm over the whole
    vector: that is `norm="l2"`, `block_size=None` and a single segment. The default differs, as
    the error then grows with the square root of the vector's length.
    """

    bits: int = 8
    norm: BlockNorm = "max"
    block_size: int | None = 256
    compile: bool = False

    def num_bytes(self, segments: Sequence[Segment]) -> int:
        """Size of a message, padding included."""
        raw = sum(s.size for s in segments if s.raw)
        sizes = [s.size for s in segments if not s.raw and s.size]
        scales = sum(-(-n // (self.block_size or n)) for n in sizes)
        size = 4 * (raw + scales) + packed_size(sum(sizes), self.bits)
        if self.norm == "l2":
            size += packed_size(sum(sizes), 1)
        return size + -size % 4

    def encode(self, flat: Tensor, segments: Sequence[Segment], key: Tensor) -> Tensor:
        """flat: [d] fp32, key: [2] from `random_key` -> [num_bytes(segments)] uint8."""
        layout = _layout(tuple(segments), self.block_size, flat.device)
        assert flat.dtype == torch.float32
        assert flat.shape == (layout.num_elements,)
        raw = _gather(flat, layout.raw, layout.num_raw)
        scales = flat.new_empty(layout.num_scales)
        codes = flat.new_empty(layout.num_codes, dtype=code_dtype(self.bits))
        signs = flat.new_empty(layout.num_codes if self.norm == "l2" else 0, dtype=torch.bool)
        kernel = _kernels(self.compile, flat.device)[0]
        for batch in layout.batches:
            x = _gather(flat, batch.values, batch.rows * batch.block).view(batch.rows, batch.block)
            c, sign, scale = kernel(x, batch.row_position, key, self.bits, self.norm)
            scales[batch.first_row : batch.first_row + batch.rows] = scale
            _scatter(c.view(-1), batch.codes, codes)
            if sign is not None:
                _scatter(sign.view(-1), batch.codes, signs)
        parts = [raw.view(torch.uint8), scales.view(torch.uint8), pack(codes, self.bits)]
        message = torch.cat([*parts, pack(signs, 1)])
        return torch.cat([message, message.new_zeros(-message.numel() % 4)])

    def decode(self, message: Tensor, segments: Sequence[Segment]) -> Tensor:
        """message: [num_bytes(segments)] uint8, 4-byte aligned -> [d] fp32."""
        layout = _layout(tuple(segments), self.block_size, message.device)
        assert message.shape == (self.num_bytes(segments),)
        flat = torch.empty(layout.num_elements, dtype=torch.float32, device=message.device)
        if not layout.num_elements:
            return flat  # an empty slice may be misaligned
        sizes = [
            4 * layout.num_raw,
            4 * layout.num_scales,
            packed_size(layout.num_codes, self.bits),
        ]
        if self.norm == "l2":
            sizes.append(packed_size(layout.num_codes, 1))
        planes = message[: sum(sizes)].split(sizes)
        _scatter(planes[0].view(torch.float32), layout.raw, flat)
        scales = planes[1].view(torch.float32)
        codes = unpack(planes[2], layout.num_codes, self.bits)
        signs = unpack(planes[3], layout.num_codes, 1).bool() if self.norm == "l2" else None
        kernel = _kernels(self.compile, message.device)[1]
        for batch in layout.batches:
            shape = (batch.rows, batch.block)
            c = _gather(codes, batch.codes, batch.rows * batch.block).view(shape)
            sign = None
            if signs is not None:
                sign = _gather(signs, batch.codes, batch.rows * batch.block).view(shape)
            scale = scales[batch.first_row : batch.first_row + batch.rows]
            values = kernel(c, sign, scale, self.bits, self.norm)
            _scatter(values.view(-1), batch.values, flat)
        return flat


# ---------------------------------------------------------------------------- eager or compiled

_Encode = Callable[..., tuple[Tensor, Tensor | None, Tensor]]
_Decode = Callable[..., Tensor]


def _kernels(compile: bool, device: torch.device) -> tuple[_Encode, _Decode]:
    if compile:
        return _compiled_kernels(device.type)
    return (_slab_encode, _slab_decode) if device.type == "cpu" else (encode_blocks, decode_blocks)


@lru_cache(maxsize=None)  # noqa: UP033  one a kind of device
def _compiled_kernels(device_type: str) -> tuple[_Encode, _Decode]:
    """The kernels fused by torch.compile, tried once; eager, said once, where that fails."""
    device = torch.device(device_type)
    try:
        encode: _Encode = torch.compile(encode_blocks, dynamic=True)
        decode: _Decode = torch.compile(decode_blocks, dynamic=True)
        x = torch.ones(4, 8, device=device)
        position = torch.arange(0, 32, 8, dtype=torch.int32, device=device)
        decode(*encode(x, position, random_key(0, 0, 0, device), 8, "max"), 8, "max")
    except Exception as error:  # torch raises a different class for each missing tool
        logger.warning("torch.compile failed, gradients are quantised in eager mode: %s", error)
        return _kernels(False, device)
    return encode, decode


def _slab_encode(
    x: Tensor, row_position: Tensor, key: Tensor, bits: int, norm: BlockNorm
) -> tuple[Tensor, Tensor | None, Tensor]:
    rows = max(1, SLAB // x.shape[1])
    slabs = zip(x.split(rows), row_position.split(rows), strict=True)
    codes, signs, scales = zip(
        *(encode_blocks(piece, position, key, bits, norm) for piece, position in slabs), strict=True
    )
    return torch.cat(codes), torch.cat(signs) if norm == "l2" else None, torch.cat(scales)


def _slab_decode(
    codes: Tensor, signs: Tensor | None, scales: Tensor, bits: int, norm: BlockNorm
) -> Tensor:
    rows = max(1, SLAB // codes.shape[1])
    sign_slabs = [None] * len(codes.split(rows)) if signs is None else signs.split(rows)
    slabs = zip(codes.split(rows), sign_slabs, scales.split(rows), strict=True)
    return torch.cat([decode_blocks(c, sign, scale, bits, norm) for c, sign, scale in slabs])
