"""Blocks of a gradient to packed words and back: tensor code, as it is or fused by torch.compile.

A block is a row of a matrix: kernels know nothing of tensors, messages or workers.
"""

import logging
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from types import FunctionType
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from robust_accel.comm.draws import random_key, row_seeds, uniform, uniform_pair

logger = logging.getLogger(__name__)

BlockNorm = Literal["max", "l2"]
Plane: TypeAlias = tuple[Tensor, Tensor]  # steps [rows] fp32, words [rows, row_words] int32

TYPICAL_ROWS = 1023  # of a call, for which the compiler tunes; odd, as no stride is
MAX_UNROLL = 8  # messages that one kernel adds up
WIDE = 4096  # elements of a block above which most are far below a step
TINY = 2.0**-126  # the smallest step: its reciprocal is still a normal number


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


def prepare_blocks(
    x: Tensor, position: Tensor, key: Tensor, *, bits: int, norm: BlockNorm
) -> tuple[Tensor, Tensor, Tensor]:
    """What an encoder needs to know of each block.

    Args:
        x: [rows, width] fp32.
        position: [rows] int32, of each block's first element in the whole model.
        key: [2] int32, from `random_key`.

    Returns:
        steps [rows] fp32: scale / s, or NaN where the block holds NaN or Inf, so that every rank
            sees it.
        inverse [rows] fp32: of the step.
        seeds [rows] int32.
    """
    scale = block_norm(x, norm)
    steps = (scale / num_levels(bits, norm)).clamp(min=TINY)
    steps = torch.where(torch.isfinite(scale), steps, torch.nan)
    # a hair more, that the largest entry reaches level s in spite of fp32's rounding
    return steps, (1 + 2.0**-22) / steps, row_seeds(position, key)


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
    magnitude = x.abs() * inverse[:, None]
    low = magnitude.floor()
    level = (low + (uniform(seeds, x.shape[1]) < magnitude - low)).clamp(max=s)
    return torch.where(x < 0, -level, level).to(torch.int32)


def encode_max(x: Tensor, inverse: Tensor, seeds: Tensor, words: Tensor, *, bits: int) -> None:
    """Quantise blocks by (A5)-(A6) with the max norm. words: [rows, row_words] int32, filled."""
    s, parts = num_levels(bits, "max"), 32 // bits
    if x.shape[1] > WIDE:
        levels = list(_fine_levels(x, inverse, seeds, s).view(len(x), parts, -1).unbind(1))
    else:
        levels = _levels(x, inverse, seeds, s, parts)
    words.copy_(pack([level + s for level in levels], bits))


def encode_l2(
    x: Tensor, inverse: Tensor, seeds: Tensor, words: Tensor, steps: Tensor, *, bits: int
) -> None:
    """The same with the L2 norm, whose signs follow the codes; may change the sign of a step.

    b bits and a sign hold -s..s-1 and (A6) also reaches +s. Only an entry above (s - 1) / s of the
    norm can, hence at most one in a block: then the whole block changes sign, and the step.
    """
    s, parts, width = num_levels(bits, "l2"), 32 // bits, x.shape[1]
    q = _fine_levels(x, inverse, seeds, s)
    top = (q == s).any(dim=1)
    codes = torch.where(top[:, None], -q, q) + s  # [rows, width] in [0, 2s)
    low, high = codes & (s - 1), codes >> bits
    low_words = pack(low.view(-1, parts, width // parts).unbind(1), bits)
    high_words = pack(high.view(-1, 32, width // 32).unbind(1), 1)
    words.copy_(torch.cat([low_words, high_words], dim=1))
    steps.copy_(torch.where(top, -steps, steps))


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
    planes: Sequence[Plane], i: int, out: Tensor, add: bool, divisor: int, *, bits: int
) -> None:
    """Part i of what `decode_blocks` gives for `norm="max"`. out: [rows, width bits / 32]."""
    s = num_levels(bits, "max")
    values = [
        (_codes(words, i * bits, bits) - s).to(torch.float32) * steps[:, None]
        for steps, words in planes
    ]
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


def unpack(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`: [rows, n] int32 -> codes [rows, 32 / bits, n]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    return _codes(words[:, None, :], shifts[:, None], bits)


def _codes(words: Tensor, shift: Tensor | int, bits: int) -> Tensor:
    return (words >> shift) & (2**bits - 1)


# ---------------------------------------------------------------------------- eager or fused

# Before, code on CPUs rounds otherwise and writes where it must not, so that a process may abort
# (seen with 2.6, 2.8 and 2.9; 2.10 and 2.14 pass the tests).
_RIGHT_CODE = (2, 10)
_VECTOR = 16  # fp32 numbers, AVX512's


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


class Eager(Kernels):
    """Tensor code as it is."""

    def __init__(self, bits: int, norm: BlockNorm, device: torch.device) -> None:
        self._bits, self._norm = bits, norm
        # what stays in cache; on a GPU, what keeps temporaries at some ten times 16 MiB
        self.slab = 1 << 16 if device.type == "cpu" else 1 << 22

    def encode(self, x: Tensor, position: Tensor, key: Tensor, plane: Plane) -> None:
        steps, words = plane
        made, inverse, seeds = prepare_blocks(x, position, key, bits=self._bits, norm=self._norm)
        steps.copy_(made)
        if self._norm == "max":
            encode_max(x, inverse, seeds, words, bits=self._bits)
        else:
            encode_l2(x, inverse, seeds, words, steps, bits=self._bits)

    def decode(self, planes: Sequence[Plane], out: Tensor, add: bool, divisor: int) -> None:
        decode_blocks(planes, out, add, divisor, bits=self._bits, norm=self._norm)


class Fused(Kernels):
    """The same bytes, for `norm="max"`, by kernels of torch.compile."""

    slab = 1 << 62

    def __init__(self, bits: int, width: int, device: torch.device) -> None:
        self._bits, self._parts = bits, 32 // bits
        self._decoders: dict[tuple[int, bool, int], Callable[..., None]] = {}

        def prepare(tensors: Sequence[Tensor]) -> None:
            key, x, position, *outputs = tensors
            values = prepare_blocks(x, position, key, bits=bits, norm="max")
            for output, value in zip(outputs, values, strict=True):
                output.copy_(value)

        def encode(tensors: Sequence[Tensor]) -> None:
            encode_max(*tensors, bits=bits)

        x, key = torch.zeros(1, width, device=device), random_key(0, 0, 0, device)
        words = x.new_zeros(1, width // self._parts, dtype=torch.int32)
        floats, ints = x.new_zeros(1), words.new_zeros(1)
        # two kernels: one would compute a block's scale and seed for each of its vectors
        self._prepare = _fuse(prepare, [key], [x, ints, floats, floats, ints])
        self._encode = _fuse(encode, [], [x, floats, ints, words])
        self.decode([(floats, words)], x, False, 1)  # what fails does so here

    def encode(self, x: Tensor, position: Tensor, key: Tensor, plane: Plane) -> None:
        steps, words = plane
        inverse, seeds = torch.empty_like(steps), torch.empty_like(position)
        self._prepare(len(x), key, x, position, steps, inverse, seeds)
        self._encode(len(x), x, inverse, seeds, words)

    def decode(self, planes: Sequence[Plane], out: Tensor, add: bool, divisor: int) -> None:
        # part by part, in one loop: inductor loads a vector of integers slowly (AVX2), so that it
        # should be loaded once
        parts = out.view(len(out), self._parts, -1).unbind(1)
        flat = [t for plane in planes for t in plane]
        case = (len(planes), add, divisor)
        if case not in self._decoders:
            self._decoders[case] = _fuse(self._decoder(add, divisor), [], [*parts, *flat])
        self._decoders[case](len(out), *parts, *flat)

    def _decoder(self, add: bool, divisor: int) -> Callable[[Sequence[Tensor]], None]:
        bits, num_parts = self._bits, self._parts

        def decode(tensors: Sequence[Tensor]) -> None:
            parts, flat = tensors[:num_parts], tensors[num_parts:]
            planes = list(zip(flat[::2], flat[1::2], strict=True))
            for i, part in enumerate(parts):
                decode_part(planes, i, part, add, divisor, bits=bits)

        return decode


@lru_cache(maxsize=None)  # noqa: UP033  a kernel is compiled for a number of threads
@torch.no_grad()
def fused(bits: int, width: int, device: torch.device, threads: int) -> Fused | None:
    """Kernels for `norm="max"`; None, said once, where there is no compiler or it errs."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < _RIGHT_CODE:
        _say_eager(f"torch {torch.__version__} makes wrong code of it")
        return None
    words = width * bits // 32
    if device.type == "cpu" and words % _VECTOR:
        # torch 2.14's code for 24 and 25 words computes something else, and writes behind its rows
        multiple = _VECTOR * 32 // bits
        _say_eager(f"on CPUs only blocks of multiples of {multiple} elements are compiled")
        return None
    try:
        kernels = Fused(bits, width, device)
        _check(kernels, bits, width, device)
        return kernels
    except Exception as error:  # torch raises a different class for each missing tool
        _say_eager(str(error))
        return None


def _check(kernels: Fused, bits: int, width: int, device: torch.device) -> None:
    """Compare with eager code on a few blocks: compilers have bugs.

    Raises:
        RuntimeError: An element comes back further away than a step.
    """
    rows = 5
    x = torch.linspace(-1, 1, rows * width, device=device).cos().view(rows, width).contiguous()
    position = torch.arange(0, rows * width, width, dtype=torch.int32, device=device)
    key, eager = random_key(0, 0, 0, device), Eager(bits, "max", device)
    for encoder, decoder in ((kernels, eager), (eager, kernels)):
        steps = x.new_empty(rows)
        words = x.new_empty(rows, width * bits // 32, dtype=torch.int32)
        encoder.encode(x, position, key, (steps, words))
        y = torch.empty_like(x)
        decoder.decode([(steps, words)], y, False, 1)
        if not bool(((y - x).abs() <= 1.001 * steps[:, None] + 1e-6).all()):
            raise RuntimeError(f"its code for blocks of {width} elements computes something else")


def _fuse(
    function: Callable[[Sequence[Tensor]], None],
    fixed: Sequence[Tensor],
    rowwise: Sequence[Tensor],
) -> Callable[..., None]:
    """Compile for tensors of these shapes, except for the number of rows.

    A call of what torch.compile returns first proves that the arguments fit: 50 us, and four times
    as much in the middle of other work, where a kernel takes about as long. Here they fit always,
    so that the kernel itself is kept, as torch.compile's backend makes it.

    Returns:
        Takes the number of rows, then the tensors, fixed ones first.
    """
    kernels: list[Callable[..., Any]] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        kernel = torch._dynamo.lookup_backend("inductor")(graph, inputs)
        # in any order: `l_tensors_{i}_`, the number of rows, and strides, which do not change
        num_arguments = 1 + len(fixed) + len(rowwise)
        order: list[int] = []  # of arguments, then strides
        strides: list[int] = []
        for node, x in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True):
            match = re.fullmatch(r"l_tensors_(\d+)_", node.name)
            if match:
                order.append(1 + int(match[1]))
            elif x.node.hint == TYPICAL_ROWS:
                order.append(0)
            else:
                order.append(num_arguments + len(strides))
                strides.append(x.node.hint)
        assert set(order) >= set(range(1, num_arguments)), order
        pick = itemgetter(*order)
        kernels.append(lambda *arguments: kernel(*pick((*arguments, *strides))))
        return kernel

    examples = []
    for t in rowwise:
        example = t.new_zeros(TYPICAL_ROWS * t.stride(0))
        example = example.as_strided((TYPICAL_ROWS, *t.shape[1:]), t.stride())
        torch._dynamo.mark_dynamic(example, 0)
        examples.append(example)
    # new code each time: torch counts what it compiled for one, and gives up at eight
    fresh = FunctionType(
        function.__code__.replace(), function.__globals__, closure=function.__closure__
    )
    # by this process: inductor's own pool of processes takes longer to start than all of this
    with torch._inductor.config.patch(compile_threads=1):
        torch.compile(fresh, backend=keep, dynamic=False, fullgraph=True)([*fixed, *examples])
    return kernels[0]


@lru_cache(maxsize=None)  # noqa: UP033  once a reason
def _say_eager(reason: str) -> None:
    logger.warning("torch.compile is left out, gradients are quantised in eager mode: %s", reason)
