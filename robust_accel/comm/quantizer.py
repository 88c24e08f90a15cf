"""A flat gradient to bytes and back, unbiased: pure tensor code that never sees a process group.

A message is 32-bit words: floats, then codes (all ranks know the sizes, so there is no header):

    raw      fp32, one an element    tensors that `segment` leaves uncompressed
    steps    fp32, one a block       the distance between two levels
    codes    `bits` an element       block by block, a tensor's last one filled up with zeros;
                                     a block of n words holds in bits [i b, (i + 1) b) of its word j
                                     element i n + j, so that whole vectors are packed at a time
             1 bit an element        only for `norm="l2"`: signs, packed likewise, after its codes
                                     a block of more than `WIDE` elements lies as rows of so many
                                     would, and a rest

Each of the three is in the gradient's order. A message in M parts, one for each server, is a matrix
[M, floats of a part] and one [M, words of a part]: parts are of one size, the last ones filled up
with zeros. Blocks are encoded where they are sent from, and decoded where they arrive.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from robust_accel.comm.compiled import kernels_for
from robust_accel.comm.kernels import MAX_UNROLL, WIDE, BlockNorm, Kernels, Plane, words_of
from robust_accel.comm.layout import Group, Layout, Run, Segment, round_up

FUSE_LIMIT = 1 << 16  # elements from which `compile="auto"` fuses
MOST_LAYOUTS = 4096


class Message(NamedTuple):
    """Both matrices of a message in parts, or of one part [1, ...] of it."""

    floats: Tensor  # [parts, floats of a part] fp32
    words: Tensor  # [parts, words of a part] int32


class Part(NamedTuple):
    """Values of one part, decoded: what its server averages."""

    raw: Tensor  # [raw values of a part]
    blocks: list[Tensor]  # of each group [rows of a part, width]


@dataclass(frozen=True)
class Quantizer:
    """Block-wise stochastic quantiser of a flat fp32 gradient.

    Args:
        bits: 16, 8, 4 or 2.
        norm: "max" divides a block by its largest magnitude; "l2" is (A5), sign sent apart.
        block_size: elements a block; blocks never straddle segments. None: one block a segment, or
            one for each part of it.
        compile: fuse the arithmetic with torch.compile, to the same bytes; "auto" does so for at
            least `FUSE_LIMIT` elements. Eager where there is no compiler (or one that errs: before
            torch 2.10), and for whole tensors of at most `WIDE` elements as blocks.

    Source: equations (A5)-(A6) of DAT, arXiv 2206.06257. They take one L2 norm over the whole
    vector: that is `norm="l2"`, `block_size=None` and a single segment. The default differs, as
    the error then grows with the square root of the vector's length. Also, the step between levels
    is sent and not the norm, so that to decode is one multiplication.
    """

    bits: int = 8
    norm: BlockNorm = "max"
    block_size: int | None = 256
    compile: bool | Literal["auto"] = "auto"
    _layouts: dict[Any, Layout] = field(default_factory=dict, compare=False, repr=False)

    # ------------------------------------------------------------------ one message of it all

    def num_bytes(self, segments: Sequence[Segment]) -> int:
        """Size of a message, a multiple of 4."""
        num_words = 0
        for s in segments:
            block = self.block_size or max(s.size, 1)
            num_words += s.size if s.raw else -(-s.size // block) * (1 + self._row_words(block))
        return 4 * num_words

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
        if out is None:
            out = flat.new_empty(self.num_bytes(segments), dtype=torch.uint8)
        if len(out):  # an empty slice may be misaligned
            layout = self._layout(segments, 1, flat.device)
            self._encode(flat, layout, key, self._whole(out, layout))
        return out

    def decode(
        self, message: Tensor, segments: Sequence[Segment], out: Tensor | None = None
    ) -> Tensor:
        """message: [num_bytes(segments)] uint8, 4-byte aligned -> [d] fp32, `out` where given."""
        return self.mean(message[None], segments, out)

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
        layout = self._layout(segments, 1, messages.device)
        assert messages.shape[1] == self.num_bytes(segments)
        if out is None:
            out = messages.new_empty(layout.num_elements, dtype=torch.float32)
        if layout.num_elements:
            self._decode([self._whole(m, layout) for m in messages.unbind()], layout, out)
        return out

    # ------------------------------------------------------------------ in parts, for servers

    def encode_parts(
        self,
        flat: Tensor,
        segments: Sequence[Segment],
        key: Tensor,
        parts: int,
        *,
        chunked: bool = False,
    ) -> Message:
        """Quantise a gradient [d] into so many parts; chunked: each of its equal chunks is one."""
        layout = self._layout(segments, parts, flat.device, chunked)
        words = sum(g.rows_of_part * self._row_words(g.width) for g in layout.groups)
        message = Message(
            flat.new_empty(parts, layout.floats_of_part),
            flat.new_empty(parts, words, dtype=torch.int32),
        )
        self._encode(flat, layout, key, message)
        return message

    def mean_of_chunk(self, received: Message, segments: Sequence[Segment], out: Tensor) -> Tensor:
        """What the owner of a chunk makes of every worker's part of it -> [n] fp32, `out`.

        received: row m is worker m's, by `encode_parts(..., chunked=True)`.
        segments: of the chunk alone.
        """
        layout = self._layout(segments, 1, out.device)
        rows = zip(received.floats.split(1), received.words.split(1), strict=True)
        self._decode([Message(*row) for row in rows], layout, out)
        return out

    @torch.no_grad()
    def mean_of_part(
        self, received: Message, segments: Sequence[Segment], memory: Tensor | None = None
    ) -> Part:
        """What a server makes of its part of every worker's message: row m is worker m's.

        memory: [d] fp32 that may be overwritten, and hold the values then: new memory is dear.
        """
        layout = self._layout(segments, len(received.floats), received.floats.device)
        raw = _mean(received.floats[:, : layout.raw_of_part].unbind())
        blocks = []
        for group, steps, words in self._spans(layout):
            codes = received.words[:, words].unflatten(1, (group.rows_of_part, -1))
            planes = zip(received.floats[:, steps].unbind(), codes.unbind(), strict=True)
            sources: list[Plane] = list(planes)
            size = group.rows_of_part * group.width
            if memory is None or len(memory) < size:
                memory = raw.new_empty(size)
            y, memory = memory[:size].view(-1, group.width), memory[size:]
            kernels, row = self._kernels(layout, group.width, y.device), 0
            for slab in y.split(max(1, kernels.slab // group.width)):
                self._average(kernels, sources, slice(row, row + len(slab)), slab)
                row += len(slab)
            blocks.append(y)
        return Part(raw, blocks)

    @torch.no_grad()
    def encode_part(
        self, part: Part, segments: Sequence[Segment], key: Tensor, rank: int, parts: int
    ) -> Message:
        """Quantise a server's mean: what goes back to every worker, [1, ...]."""
        layout = self._layout(segments, parts, part.raw.device)
        steps, words = [], []
        for group, x in zip(layout.groups, part.blocks, strict=True):
            kernels = self._kernels(layout, group.width, x.device)
            own = group.position[rank * group.rows_of_part :][: group.rows_of_part]
            plane = (
                x.new_empty(len(x)),
                x.new_empty(len(x), self._row_words(group.width), dtype=torch.int32),
            )
            self._quantize(kernels, x.split(max(1, kernels.slab // group.width)), own, key, plane)
            steps.append(plane[0])
            words.append(plane[1].view(-1))
        codes = _joined(words, part.raw.new_empty(0, dtype=torch.int32))
        return Message(torch.cat([part.raw, *steps])[None], codes[None])

    @torch.no_grad()
    def decode_parts(self, message: Message, segments: Sequence[Segment], out: Tensor) -> Tensor:
        """All parts, as `encode_part` made them -> [d] fp32, `out`."""
        layout = self._layout(segments, len(message.floats), out.device)
        self._decode([message], layout, out)
        return out

    def part_in_full(self, part: Part) -> Message:
        """A server's mean as it is, [1, ...]: raw values, and values for words."""
        values = _joined([block.view(-1) for block in part.blocks], part.raw[:0])
        return Message(part.raw[None], values[None])

    @torch.no_grad()
    def place_parts(self, message: Message, segments: Sequence[Segment], out: Tensor) -> Tensor:
        """All parts, as `part_in_full` made them of blocks of one size -> [d] fp32, `out`."""
        layout = self._layout(segments, len(message.floats), out.device)
        _scatter(message.floats.reshape(-1), layout.raw, out)
        for group in layout.groups:
            rows, row = message.words.view(-1, group.width), 0
            short = out.new_empty(group.num_short * group.width)
            for y in group.slabs(out, short, out.numel()):
                y.copy_(rows[row : row + len(y), : y.shape[1]])
                row += len(y)
            _scatter(short, group.short, out)
        return out

    # ------------------------------------------------------------------ both

    @torch.no_grad()
    def _encode(self, flat: Tensor, layout: Layout, key: Tensor, message: Message) -> None:
        assert flat.dtype == torch.float32
        assert flat.shape == (layout.num_elements,)
        cut = layout.parts > 1  # else what is written lies in the message already
        raw = flat.new_zeros(layout.parts * layout.raw_of_part) if cut else message.floats[0]
        _gather(flat, layout.raw, raw)
        floats = [raw]
        for group, [(steps, words)] in self._by_group(layout, [message]):
            kernels = self._kernels(layout, group.width, flat.device)
            short = flat.new_zeros(group.num_short * group.width)
            _gather(flat, group.short, short)
            if cut:
                steps = flat.new_zeros(len(words))
                words[group.rows :].zero_()
            slabs = group.slabs(flat, short, kernels.slab)
            self._quantize(kernels, slabs, group.position, key, (steps, words))
            floats.append(steps)
        if cut:
            torch.cat([f.view(layout.parts, -1) for f in floats], dim=1, out=message.floats)

    @torch.no_grad()
    def _decode(self, messages: Sequence[Message], layout: Layout, out: Tensor) -> None:
        raws = [m.floats[:, : layout.raw_of_part].reshape(-1) for m in messages]
        _scatter(_mean(raws), layout.raw, out)
        for group, sources in self._by_group(layout, messages):
            kernels = self._kernels(layout, group.width, out.device)
            short, row = out.new_empty(group.num_short * group.width), 0
            for y in group.slabs(out, short, kernels.slab):
                self._average(kernels, sources, slice(row, row + len(y)), y)
                row += len(y)
            _scatter(short, group.short, out)

    def _spans(self, layout: Layout) -> Iterator[tuple[Group, slice, slice]]:
        """Each group with its columns of a message's floats and words."""
        start, word = layout.raw_of_part, 0
        for group in layout.groups:
            end = start + group.rows_of_part
            stop = word + group.rows_of_part * self._row_words(group.width)
            yield group, slice(start, end), slice(word, stop)
            start, word = end, stop

    def _by_group(
        self, layout: Layout, messages: Sequence[Message]
    ) -> Iterator[tuple[Group, list[Plane]]]:
        """The planes of each group: steps and words of all rows, in order."""
        for group, steps, columns in self._spans(layout):
            shape = (-1, group.rows_of_part, self._row_words(group.width))
            yield (
                group,
                [
                    # views: there is one group, or one row a part
                    (floats[:, steps].reshape(-1), words[:, columns].view(shape).view(-1, shape[2]))
                    for floats, words in messages
                ],
            )

    @staticmethod
    def _quantize(
        kernels: Kernels, slabs: Any, position: Tensor, key: Tensor, plane: Plane
    ) -> None:
        row = 0
        for x in slabs:
            rows = slice(row, row + len(x))
            kernels.encode(x, position[rows], key, (plane[0][rows], plane[1][rows]))
            row += len(x)

    @staticmethod
    def _average(kernels: Kernels, sources: Sequence[Plane], rows: slice, y: Tensor) -> None:
        for m in range(0, len(sources), MAX_UNROLL):
            some = sources[m : m + MAX_UNROLL]
            if len(y) < len(some[0][0]):
                some = [(steps[rows], words[rows]) for steps, words in some]
            last = m + MAX_UNROLL >= len(sources)
            kernels.decode(some, y, m > 0, len(sources) if last else 1)

    @property
    def _unit(self) -> int:
        """Elements that fill whole words of codes, and of signs."""
        return 32 if self.norm == "l2" else 32 // self.bits

    def _row_words(self, block: int) -> int:
        return words_of(round_up(block, self._unit), self.bits, self.norm)

    def _layout(
        self, segments: Sequence[Segment], parts: int, device: torch.device, chunked: bool = False
    ) -> Layout:
        known = (tuple(segments), parts, device, chunked)
        if known not in self._layouts:
            if len(self._layouts) >= MOST_LAYOUTS:  # buckets that come in ever other orders
                self._layouts.clear()
            made = Layout.of(known[0], self.block_size, self._unit, parts, device, chunked)
            self._layouts[known] = made
        return self._layouts[known]

    def _whole(self, message: Tensor, layout: Layout) -> Message:
        """Views of a message [num_bytes], in one part."""
        floats = layout.floats_of_part
        return Message(
            message.view(torch.float32)[None, :floats], message.view(torch.int32)[None, floats:]
        )

    def _kernels(self, layout: Layout, width: int, device: torch.device) -> Kernels:
        fuse = layout.num_elements >= FUSE_LIMIT if self.compile == "auto" else self.compile
        # each width is a kernel of its own, made from a thousand such rows
        own = self.block_size is None and width <= WIDE
        return kernels_for(self.bits, self.norm, width, device, fuse=fuse and not own)


def _mean(raws: Sequence[Tensor]) -> Tensor:
    total = raws[0].clone()
    for raw in raws[1:]:
        total += raw
    return total if len(raws) == 1 else total.mul_(1.0 / len(raws))


def _joined(parts: Sequence[Tensor], empty: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([empty, *parts])


def _gather(source: Tensor, runs: tuple[Run, ...], out: Tensor) -> None:
    if runs:
        torch._foreach_copy_(
            [out[d : d + n] for _, d, n in runs], [source[s : s + n] for s, _, n in runs]
        )


def _scatter(source: Tensor, runs: tuple[Run, ...], out: Tensor) -> None:
    """Copy runs back from where `_gather` put them."""
    if runs:
        torch._foreach_copy_(
            [out[s : s + n] for s, _, n in runs], [source[d : d + n] for _, d, n in runs]
        )
