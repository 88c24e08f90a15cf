"""The arithmetic of `kernels.py` fused by torch.compile, to the same bytes, where it can be."""

import logging
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from operator import itemgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from robust_accel.comm.draws import random_key
from robust_accel.comm.kernels import (
    WIDE,
    BlockNorm,
    Eager,
    Kernels,
    Long,
    Plane,
    RowKernels,
    block_norm,
    decode_part,
    encode_blocks,
    prepare_blocks,
    words_of,
)

logger = logging.getLogger(__name__)

TYPICAL_ROWS = 1023  # of a call, for which the compiler tunes; odd, as no stride is
# Before, code on CPUs rounds otherwise and writes where it must not, so that a process may abort
# (seen with 2.6, 2.8 and 2.9; 2.10 and 2.14 pass the tests).
_RIGHT_CODE = (2, 10)
_VECTOR = 16  # fp32 numbers, AVX512's


def kernels_for(
    bits: int, norm: BlockNorm, width: int, device: torch.device, *, fuse: bool
) -> Kernels:
    """The arithmetic of blocks of `width` elements, fused if asked for and possible.

    Of a long block the rows are: its rest has a width that is no other's.
    """
    long = width > WIDE
    rows: RowKernels = Eager(bits, norm, device, fine=long)
    if fuse:
        rows = fused(bits, norm, min(width, WIDE), long, device, torch.get_num_threads()) or rows
    return Long(bits, norm, width, rows, Eager(bits, norm, device, fine=True)) if long else rows


class Fused(RowKernels):
    """The same bytes by kernels of torch.compile, each made when it is first used.

    Args:
        fine: see `encode_blocks`.
    """

    def __init__(
        self, bits: int, norm: BlockNorm, width: int, fine: bool, device: torch.device
    ) -> None:
        self._bits, self._norm, self._fine = bits, norm, fine
        # codes whose signs go apart are kept meanwhile, which should be in a cache
        self.slab = 1 << 18 if norm == "l2" and device.type == "cpu" else 1 << 62
        self._decoders: dict[tuple[int, bool, int], Callable[..., None]] = {}
        self._key, self._x = random_key(0, 0, 0, device), torch.zeros(1, width, device=device)
        self._float = self._x.new_zeros(1)
        self._words = self._x.new_zeros(1, words_of(width, bits, norm), dtype=torch.int32)
        self._int = self._words.new_zeros(1)

    def encode(self, x: Tensor, position: Tensor, key: Tensor, plane: Plane) -> None:
        # two kernels: one would compute a block's scale and seed for each of its vectors
        steps, words = plane
        inverse, seeds = torch.empty_like(steps), torch.empty_like(position)
        self._prepare(len(x), key, x, position, steps, inverse, seeds)
        self.encode_rows(x, inverse, seeds, words)

    def norms(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x))
        self._norms(len(x), x, out)
        return out

    def encode_rows(self, x: Tensor, inverse: Tensor, seeds: Tensor, words: Tensor) -> None:
        self._encode(len(x), x, inverse, seeds, words)

    def decode(self, planes: Sequence[Plane], out: Tensor, add: bool, divisor: int) -> None:
        # part by part, in one loop: inductor loads a vector of integers slowly (AVX2), so that it
        # should be loaded once
        outputs = out.view(len(out), 32 // self._bits, -1).unbind(1)
        flat = [t for plane in planes for t in plane]
        case = (len(planes), add, divisor)
        if case not in self._decoders:
            self._decoders[case] = _fuse(self._decoder(add, divisor), [], [*outputs, *flat])
        self._decoders[case](len(out), *outputs, *flat)

    @cached_property
    def _prepare(self) -> Callable[..., None]:
        bits, norm = self._bits, self._norm

        def prepare(tensors: Sequence[Tensor]) -> None:
            key, x, position, *outputs = tensors
            values = prepare_blocks(x, position, key, bits=bits, norm=norm)
            for output, value in zip(outputs, values, strict=True):
                output.copy_(value)

        return _fuse(
            prepare, [self._key], [self._x, self._int, self._float, self._float, self._int]
        )

    @cached_property
    def _norms(self) -> Callable[..., None]:
        norm = self._norm

        def norms(tensors: Sequence[Tensor]) -> None:
            x, out = tensors
            out.copy_(block_norm(x, norm))

        return _fuse(norms, [], [self._x, self._float])

    @cached_property
    def _encode(self) -> Callable[..., None]:
        bits, norm, fine = self._bits, self._norm, self._fine

        def encode(tensors: Sequence[Tensor]) -> None:
            x, inverse, seeds, words = tensors
            encode_blocks(x, inverse, seeds, words, bits=bits, norm=norm, fine=fine)

        return _fuse(encode, [], [self._x, self._float, self._int, self._words])

    def _decoder(self, add: bool, divisor: int) -> Callable[[Sequence[Tensor]], None]:
        bits, norm = self._bits, self._norm

        def decode(tensors: Sequence[Tensor]) -> None:
            parts, flat = tensors[: 32 // bits], tensors[32 // bits :]
            planes = list(zip(flat[::2], flat[1::2], strict=True))
            for i, part in enumerate(parts):
                decode_part(planes, i, part, add, divisor, bits=bits, norm=norm)

        return decode


@lru_cache(maxsize=None)  # noqa: UP033  a kernel is compiled for a number of threads
@torch.no_grad()
def fused(
    bits: int, norm: BlockNorm, width: int, long: bool, device: torch.device, threads: int
) -> Fused | None:
    """For blocks of this width, or rows of long ones; None, said once, if no compiler makes it."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < _RIGHT_CODE:
        _say_eager(f"torch {torch.__version__} makes wrong code of it")
        return None
    narrowest = 1 if norm == "l2" else bits  # of what is packed
    if device.type == "cpu" and width * narrowest // 32 % _VECTOR:
        # torch 2.14's code for 24 and 25 words computes something else, and writes behind its rows
        multiple = _VECTOR * 32 // narrowest
        _say_eager(f"on CPUs only blocks of multiples of {multiple} elements are compiled")
        return None
    try:
        kernels = Fused(bits, norm, width, long, device)
        _check(kernels, bits, norm, width, long, device)
        return kernels
    except Exception as error:  # torch raises a different class for each missing tool
        _say_eager(str(error))
        return None


def _check(
    kernels: Fused, bits: int, norm: BlockNorm, width: int, long: bool, device: torch.device
) -> None:
    """Compare with eager code on a few blocks, or rows of one: compilers have bugs.

    Raises:
        RuntimeError: An element comes back further away than a step.
    """
    rows = 5
    x = torch.linspace(-1, 1, rows * width, device=device).cos().view(rows, width).contiguous()
    position = torch.arange(0, rows * width, width, dtype=torch.int32, device=device)
    key, eager = random_key(0, 0, 0, device), Eager(bits, norm, device, fine=long)
    pair: tuple[Kernels, ...] = (kernels, eager)
    if long:
        x, position = x.view(1, -1), position[:1]
        pair = tuple(Long(bits, norm, x.numel(), own, eager) for own in (kernels, eager))
    for encoder, decoder in (pair, pair[::-1]):
        steps = x.new_empty(len(x))
        words = x.new_empty(len(x), words_of(x.shape[1], bits, norm), dtype=torch.int32)
        encoder.encode(x, position, key, (steps, words))
        y = torch.empty_like(x)
        decoder.decode([(steps, words)], y, False, 1)
        if not bool(((y - x).abs() <= 1.001 * steps.abs()[:, None] + 1e-6).all()):
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
