"""Blocks of a gradient to packed words and back, in tensor code.

A block is a row of a matrix, or if it is long several: kernels know nothing of tensors, messages or
workers.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from robust_accel.comm.draws import row_seeds, uniform, uniform_pair

BlockNorm = Literal["max", "l2"]
Plane: TypeAlias = tuple[Tensor, Tensor]  # steps [rows] fp32, words [rows, row_words] int32

MAX_UNROLL = 8  # messages that one kernel adds up
WIDE = 4096  # elements of a block above which most are far below a step
TINY = 2.0**-126  # the smallest step: its reciprocal is still a normal number


# ---------------------------------------------------------------------------- blocks to words


def num_levels(bits: int, norm: BlockNorm) -> int:
    """s: max norm keeps the sign in the code (2s + 1 <= 2^b); (A5) sends it apart (s = 2^b)."""
    return 2**bits if norm == "l2" else 2 ** (bits - 1) - 1


def words_of(width: int, bits: int, norm: BlockNorm) -> int:
    """Words of a block's codes, and signs where they are apart; `width` fills whole ones."""
    return width * (bits + (norm == "l2")) // 32


def block_norm(x: Tensor, norm: BlockNorm) -> Tensor:
    """Norm of each block; NaN or Inf where the block holds one. x: [rows, width] -> [rows]."""
    if norm == "max":
        return x.abs().amax(dim=1)
    # squares of fp32 overflow above 1e19 and vanish below 1e-23; and in any order this sum is one
    return x.double().square().sum(dim=1).sqrt().float()


def steps_of(scale: Tensor, x: Tensor, *, bits: int, norm: BlockNorm) -> tuple[Tensor, Tensor]:
    """The distance of two levels in each block, and its inverse. scale: [rows], x: [rows, width].

    Steps are NaN where the block holds NaN or Inf, so that every rank sees it. With the L2 norm, b
    bits and a sign hold -s..s-1 and (A6) also reaches +s. Only an entry above (s - 1) / s of the
    norm can, hence at most one in a block: there block and step change sign.
    """
    s = num_levels(bits, norm)
    steps = (scale / s).clamp(min=TINY)
    steps = torch.where(torch.isfinite(scale), steps, torch.nan)
    # a hair more, that the largest entry reaches level s in spite of fp32's rounding
    inverse = (1 + 2.0**-22) / steps
    if norm == "max":
        return steps, inverse
    turned = x.amax(dim=1) * inverse > s - 1
    return torch.where(turned, -steps, steps), torch.where(turned, -inverse, inverse)


def prepare_blocks(
    x: Tensor, position: Tensor, key: Tensor, *, bits: int, norm: BlockNorm
) -> tuple[Tensor, Tensor, Tensor]:
    """What an encoder needs to know of each block.

    Args:
        x: [rows, width] fp32.
        position: [rows] int32, of each block's first element in the whole model.
        key: [2] int32, from `random_key`.

    Returns:
        steps [rows] fp32 and inverse [rows] fp32, see `steps_of`; seeds [rows] int32.
    """
    return *steps_of(block_norm(x, norm), x, bits=bits, norm=norm), row_seeds(position, key)


def _levels(x: Tensor, inverse: Tensor, seeds: Tensor, s: int, parts: int) -> list[Tensor]:
    """Levels in [-s, s], by parts of a block: `parts` of [rows, width / parts] int32."""
    size = x.shape[1] // parts
    levels: list[Tensor] = []
    for i, part in enumerate(x.view(-1, parts, size).unbind(1)):
        if i % 2 == 0:
            draws = uniform_pair(seeds, i * size, size)
        # floor of a signed x has the law of (A6), which rounds |x|; the sum's own rounding to 24
        # bits is below that of x
        level = (part * inverse[:, None] + draws[i % 2]).floor().to(torch.int32)
        levels.append(level.clamp(-s, s))
    return levels


def _fine_levels(x: Tensor, inverse: Tensor, seeds: Tensor, s: int) -> Tensor:
    """The same by 32 random bits: most entries of a long vector are far below a step."""
    value = x * inverse[:, None]
    magnitude = value.abs()
    low = magnitude.floor()
    level = low + (uniform(seeds, x.shape[1]) < magnitude - low)
    return torch.where(value < 0, -level, level).to(torch.int32).clamp(-s, s)


def encode_blocks(
    x: Tensor,
    inverse: Tensor,
    seeds: Tensor,
    words: Tensor,
    *,
    bits: int,
    norm: BlockNorm,
    fine: bool,
) -> None:
    """Quantise blocks by (A5)-(A6).

    Args:
        x: [rows, width] fp32.
        inverse: [rows], of the steps.
        seeds: [rows] int32.
        words: [rows, row_words] int32, filled; with the L2 norm signs follow the codes.
        fine: draw 32 random bits an element, which the L2 norm always needs, and not 16.
    """
    s, parts = num_levels(bits, norm), 32 // bits
    if norm == "max" and not fine:
        words.copy_(pack([level + s for level in _levels(x, inverse, seeds, s, parts)], bits))
        return
    levels = _fine_levels(x, inverse, seeds, s)
    if norm == "max":
        words.copy_(_packed(levels + s, bits))
        return
    codes = levels.clamp(max=s - 1) + s  # [rows, width] in [0, 2s)
    words.copy_(torch.cat([_packed(codes & (s - 1), bits), _packed(codes >> bits, 1)], dim=1))


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
    s, parts = num_levels(bits, norm), 32 // bits
    n = out.shape[1] // parts
    values = []
    for steps, words in planes:
        codes = unpack(words[:, :n], bits)
        if norm == "l2":
            codes = codes + (unpack(words[:, n:], 1).view(codes.shape) << bits)
        values.append((codes - s).to(torch.float32) * steps[:, None, None])
    _sum(values, out.view(-1, parts, n), add, divisor)


def decode_part(
    planes: Sequence[Plane],
    i: int,
    out: Tensor,
    add: bool,
    divisor: int,
    *,
    bits: int,
    norm: BlockNorm,
) -> None:
    """Part i of what `decode_blocks` gives. out: [rows, width bits / 32].

    Compiled, it is one loop over all parts; as it is, so many operations more: up to six times the
    time of `decode_blocks`.
    """
    s, n = num_levels(bits, norm), out.shape[1]
    values = []
    for steps, words in planes:
        codes = _codes(words[:, :n], i * bits, bits)
        if norm == "l2":
            shifts = torch.arange(i * bits, (i + 1) * bits, dtype=torch.int32, device=out.device)
            signs = _codes(words[:, None, n:], shifts[:, None], 1)
            codes = codes + (signs.view(codes.shape) << bits)
        values.append((codes - s).to(torch.float32) * steps[:, None])
    _sum(values, out, add, divisor)


def _sum(values: Sequence[Tensor], out: Tensor, add: bool, divisor: int) -> None:
    total = out if add else None
    for value in values:
        total = value if total is None else total + value
    assert total is not None
    out.copy_(total if divisor == 1 else total * (1.0 / divisor))


def pack(parts: Sequence[Tensor], bits: int) -> Tensor:
    """32 / bits matrices of codes below 2^bits, [rows, n] int32 each -> words [rows, n]."""
    words = parts[0]
    for i, codes in enumerate(parts[1:], start=1):
        words = words | (codes << (i * bits))
    return words


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Blocks of codes [rows, width], a part a bit field -> words [rows, width bits / 32]."""
    return pack(codes.view(len(codes), 32 // bits, -1).unbind(1), bits)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: [rows, n] int32 -> codes [rows, 32 / bits, n]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return _codes(words[:, None, :], shifts[:, None], bits)


def _codes(words: Tensor, shift: Tensor | int, bits: int) -> Tensor:
    return (words >> shift) & (2**bits - 1)


# ---------------------------------------------------------------------------- what a format needs


class Kernels(Protocol):
    """The arithmetic of one format.

    Attributes:
        slab: elements that one call should handle at most.
    """

    slab: int

    def encode(self, x: Tensor, position: Tensor, key: Tensor, plane: Plane) -> None:
        """Quantise blocks [rows, width] into a plane; the rest is as for `prepare_blocks`."""

    def decode(self, planes: Sequence[Plane], out: Tensor, add: bool, divisor: int) -> None:
        """See `decode_blocks`."""


class RowKernels(Kernels, Protocol):
    """That of rows, which may be blocks or parts of one."""

    def norms(self, x: Tensor) -> Tensor:
        """See `block_norm`."""

    def encode_rows(self, x: Tensor, inverse: Tensor, seeds: Tensor, words: Tensor) -> None:
        """See `encode_blocks`."""


class Eager(RowKernels):
    """Tensor code as it is."""

    def __init__(
        self, bits: int, norm: BlockNorm, device: torch.device, fine: bool = False
    ) -> None:
        self._bits, self._norm, self._fine = bits, norm, fine
        # what stays in cache; on a GPU, what keeps temporaries at some ten times 16 MiB
        self.slab = 1 << 16 if device.type == "cpu" else 1 << 22

    def norms(self, x: Tensor) -> Tensor:
        return block_norm(x, self._norm)

    def encode_rows(self, x: Tensor, inverse: Tensor, seeds: Tensor, words: Tensor) -> None:
        encode_blocks(x, inverse, seeds, words, bits=self._bits, norm=self._norm, fine=self._fine)

    def encode(self, x: Tensor, position: Tensor, key: Tensor, plane: Plane) -> None:
        steps, words = plane
        made, inverse, seeds = prepare_blocks(x, position, key, bits=self._bits, norm=self._norm)
        steps.copy_(made)
        self.encode_rows(x, inverse, seeds, words)

    def decode(self, planes: Sequence[Plane], out: Tensor, add: bool, divisor: int) -> None:
        decode_blocks(planes, out, add, divisor, bits=self._bits, norm=self._norm)


class Long(Kernels):
    """Blocks of more than `WIDE` elements: rows of so many with a norm in common, and a rest.

    Blocks may come without the zeros that fill their last word.

    Args:
        width: elements of a block, zeros included.
        rows: for rows of `WIDE` elements, with fine draws.
        rest: for shorter ones, with fine draws.
    """

    slab = 1 << 62

    def __init__(
        self, bits: int, norm: BlockNorm, width: int, rows: RowKernels, rest: RowKernels
    ) -> None:
        self._bits, self._norm, self._width = bits, norm, width
        self._rows, self._rest = rows, rest

    def encode(self, x: Tensor, position: Tensor, key: Tensor, plane: Plane) -> None:
        steps, words = plane
        parts = [(part, part.of(x)) for part in self._parts(x)]
        norms = torch.cat([p.kernels.norms(rows).view(len(x), -1) for p, rows in parts], dim=1)
        made, inverse = steps_of(block_norm(norms, self._norm), x, bits=self._bits, norm=self._norm)
        steps.copy_(made)
        starts = torch.arange(0, self._width, WIDE, dtype=torch.int32, device=x.device)
        seeds = row_seeds((position[:, None] + starts).view(-1), key).view(len(x), -1)
        for part, rows in parts:
            codes, first = part.words_in(words), part.start // WIDE
            own = seeds[:, first : first + part.number].reshape(-1).contiguous()
            about = (rows, inverse.repeat_interleave(part.number), own, codes)
            for some in zip(*(t.split(part.slab) for t in about), strict=True):
                part.kernels.encode_rows(*some)
            _give_back(codes, words[:, part.columns])

    def decode(self, planes: Sequence[Plane], out: Tensor, add: bool, divisor: int) -> None:
        for part in self._parts(out):
            y = part.of(out)
            flat = [y]
            for steps, words in planes:
                flat += [steps.repeat_interleave(part.number), part.words_in(words)]
            for rows, *some in zip(*(t.split(part.slab) for t in flat), strict=True):
                pairs = list(zip(some[::2], some[1::2], strict=True))
                part.kernels.decode(pairs, rows, add, divisor)
            _give_back(y, out[:, part.start : part.stop])

    def _parts(self, x: Tensor) -> "list[_Part]":
        """Whole rows, then the rest, which may be as long where zeros are lacking."""
        whole = x.shape[1] // WIDE * WIDE
        cut = words_of(whole, self._bits, self._norm)
        parts = [_Part(self._rows, 0, whole, WIDE, slice(0, cut))]
        if whole < self._width:
            row = self._width - whole
            parts.append(_Part(self._rest, whole, self._width, row, slice(cut, None)))
        return parts


class _Part(NamedTuple):
    """Columns of long blocks, as rows."""

    kernels: RowKernels
    start: int
    stop: int
    row: int  # elements
    columns: slice  # of the words

    @property
    def number(self) -> int:
        """Rows of a block."""
        return (self.stop - self.start) // self.row

    @property
    def slab(self) -> int:
        return max(1, self.kernels.slab // self.row)

    def of(self, x: Tensor) -> Tensor:
        """[blocks, width] -> [blocks number, row]: a view, or a copy if it must be."""
        own = x[:, self.start : self.stop]
        lacking = self.stop - self.start - own.shape[1]
        own = pad(own, (0, lacking)) if lacking else own
        return own.reshape(-1, self.row).contiguous()

    def words_in(self, words: Tensor) -> Tensor:
        """The same of [blocks, row_words]."""
        return words[:, self.columns].reshape(len(words) * self.number, -1).contiguous()


def _give_back(rows: Tensor, blocks: Tensor) -> None:
    """What was written into a copy of columns."""
    if rows.data_ptr() != blocks.data_ptr():
        blocks.copy_(rows.view(len(blocks), -1)[:, : blocks.shape[1]])
