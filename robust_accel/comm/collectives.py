"""Who sends what: protocols that turn each worker's gradient into the mean on every worker.

They know nothing of DDP, FSDP2 or DeepSpeed. Every rank decodes the same bytes with the same
operations in the same order, so that parameters stay bit-identical across ranks.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from annotated_types import Ge
from pydantic import BeforeValidator
from torch import Tensor

from robust_accel.comm.base import All, Chunks, Exchange, run_all
from robust_accel.comm.draws import random_key
from robust_accel.comm.kernels import BlockNorm
from robust_accel.comm.layout import Segment, split
from robust_accel.comm.meter import Meter
from robust_accel.comm.quantizer import Message, Quantizer
from robust_accel.comm.workers import Workers
from robust_accel.settings import Flag, Settings, Whole, parse_choice

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# torch 2.14 renamed it and warns about the name that older ones know
all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_SERVER = -1  # the random stream of means: it does not depend on which rank serves a chunk
_SLICE = 1 << 21  # elements exchanged at a time: one slice is computed while another is sent


class AllReduce(Settings):
    """The uncompressed baseline (the 32-bit rows of Table 4), or a cast to half precision.

    Args:
        dtype: In which gradients are sent and added up.
    """

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"

    def exchanges(
        self, flat: Tensor, segments: Sequence[Segment], step: int, workers: Workers, meter: Meter
    ) -> Sequence[Exchange]:
        """See `Collective.exchanges`. A ring sends 2 (M - 1) / M of the gradient."""
        return [self._exchange(flat, workers, meter)]

    def _exchange(self, flat: Tensor, workers: Workers, meter: Meter) -> Exchange:
        # multiplied before the sum: DDP's own order, and a sum of halves overflows less
        mean = flat.mul_(1.0 / workers.size).to(_DTYPES[self.dtype])
        meter.sent(2 * (workers.size - 1) * mean.nbytes / workers.size)
        yield _sent(dist.all_reduce(mean, group=workers.group, async_op=True))
        if mean is not flat:
            flat.copy_(mean)

    def scatter(
        self, rows: Tensor, chunks: Chunks, step: int, workers: Workers, meter: Meter, out: Tensor
    ) -> None:
        """See `ShardingCollective.scatter`. A ring sends (M - 1) / M of the gradient.

        FSDP2's own type is kept where it is narrower. On CPUs it is twice as much: gloo's
        reduce-scatter is an all-reduce.
        """
        dtype, op, mean = _DTYPES[self.dtype], dist.ReduceOp.AVG, out
        if rows.itemsize > dtype.itemsize:
            # multiplied before the sum, as above
            rows, op = rows.mul(1.0 / workers.size).to(dtype), dist.ReduceOp.SUM
            mean = rows.new_empty(len(out))
        rounds = 2 if rows.device.type == "cpu" else 1
        meter.sent(rounds * (workers.size - 1) * rows.nbytes / workers.size)
        _reduce_scatter_tensor(mean, rows.view(-1), op=op, group=workers.group)
        if mean is not out:
            out.copy_(mean)


class _Route(NamedTuple):
    """How messages travel: by one group to where they are decoded, by another back."""

    there: dist.ProcessGroup | None
    back: dist.ProcessGroup | None
    meter: Meter


class QSGD(Settings):
    """Quantised gradients: (A5)-(A6) of DAT, arXiv 2206.06257, block-wise and packed.

    Where several machines hold several workers each, the mean over a machine's workers is taken
    in fp32, and only machines exchange quantised gradients.

    Args:
        bits: bits an element, scales and signs apart.
        sides: 1 quantises each worker's gradient (step 7 of Algorithm A1, the paper's
            Ring-AllReduce setting); 2 also quantises the mean (step 10, its parameter-server
            setting), with every worker the server of 1/M of the gradient. FSDP2's workers keep
            the mean that they serve, and send parameters: there both say the same, but for the
            exchange between replicas.
        norm: "max" (default) or the paper's "l2" with s = 2^bits levels.
        block_size: elements that share a norm: 256, or 128 below 8 bits, where not given ("auto");
            null is a whole tensor; "whole" is the whole gradient as far as one exchange holds it
            (a bucket: DDP's `bucket_cap_mb`), small tensors included, as in the paper. With
            `sides: 2` a block is at most what one worker serves, 1/M of it.
        seed: of the stochastic rounding.
        compile: fuse the arithmetic with torch.compile; "auto" does so for large gradients.
        weight_bits: under FSDP2, bits an element of the weights that are gathered, quantised as
            gradients are, without bias; null: they are sent as they are. What is trained, measured
            and kept are the weights themselves.
    """

    bits: Annotated[Literal[16, 8, 4, 2], BeforeValidator(parse_choice)] = 8
    sides: Annotated[Literal[1, 2], BeforeValidator(parse_choice)] = 2
    norm: BlockNorm = "max"
    block_size: Literal["auto", "whole"] | Annotated[Whole, Ge(1)] | None = "auto"
    seed: Annotated[Whole, Ge(0)] = 0
    compile: Flag | Literal["auto"] = "auto"
    weight_bits: Annotated[Literal[16, 8], BeforeValidator(parse_choice)] | None = None

    def model_copy(self, **options: Any) -> "QSGD":
        """With other settings it makes another quantiser."""
        twin = super().model_copy(**options)
        for made in ("quantizer", "weight_quantizer"):
            twin.__dict__.pop(made, None)
        return twin

    @cached_property
    def quantizer(self) -> Quantizer:
        """It keeps the layouts of the gradients that it has met."""
        block_size = self.block_size
        if block_size == "auto":
            block_size = 256 if self.bits >= 8 else 128
        elif block_size == "whole":
            block_size = None  # of one segment
        return Quantizer(self.bits, self.norm, block_size, self.compile)

    @cached_property
    def weight_quantizer(self) -> Quantizer | None:
        """Of gathered weights; `norm` and `block_size` are of gradients."""
        return None if self.weight_bits is None else Quantizer(self.weight_bits)

    def exchanges(
        self, flat: Tensor, segments: Sequence[Segment], step: int, workers: Workers, meter: Meter
    ) -> Sequence[Exchange]:
        """See `Collective.exchanges`."""
        if flat.numel() == 0:
            return []
        if self.block_size == "whole":
            segments = [Segment(flat.numel(), min(s.position for s in segments), raw=False)]
        if workers.node is None:
            replies = workers.replies or workers.group
            route = _Route(workers.group, replies, meter)
            return self._between(flat, segments, step, route)
        return [self._through_machines(flat, segments, step, workers, meter)]

    def scatter(
        self, rows: Tensor, chunks: Chunks, step: int, workers: Workers, meter: Meter, out: Tensor
    ) -> None:
        """See `ShardingCollective.scatter`.

        Step 7 of Algorithm A1, and the servers keep their means. Where machines hold several
        workers each, these first take means in fp32.
        """
        rows, group = rows.float(), workers.group
        if workers.node is not None:
            rows = _mean_in_machine(rows, workers, meter)
            chunks = [chunks[i] for i in workers.places[dist.get_rank(workers.node)]]
            group = workers.peers
        if self.block_size == "whole":
            chunks = [[Segment(rows.shape[1], c[0].position, raw=False)] for c in chunks]
        parts = len(rows)
        # by the worker's number among all: replicas of these (HSDP) round independently
        key = random_key(self.seed, dist.get_rank(), step, rows.device)
        segments = [segment for chunk in chunks for segment in chunk]
        message = self.quantizer.encode_parts(rows.view(-1), segments, key, parts, chunked=True)
        received = Message(*map(torch.empty_like, message))
        All(
            _all_to_all(there, sent, group, meter)
            for there, sent in zip(received, message, strict=True)
        ).wait()
        mean = out if out.dtype == torch.float32 else rows.new_empty(len(out))
        self.quantizer.mean_of_chunk(received, chunks[dist.get_rank(group)], mean)
        if mean is not out:
            out.copy_(mean)

    def _through_machines(
        self, flat: Tensor, segments: Sequence[Segment], step: int, workers: Workers, meter: Meter
    ) -> Exchange:
        """Full precision inside the machine: each of its workers takes one part to the others.

        It never pauses, so that what is sent inside stays in one order.
        """
        part = _Shares(flat, split(segments, _size(workers.node), self.quantizer.block_size))
        mean = part.scatter_mean(workers.node, meter)
        own = part.chunks[dist.get_rank(workers.node)]
        if own:
            run_all(self._between(mean, own, step, _Route(workers.peers, workers.peers, meter)))
        part.gather(mean, workers.node, meter)
        yield from ()

    def _between(
        self, flat: Tensor, segments: Sequence[Segment], step: int, route: _Route
    ) -> Sequence[Exchange]:
        """Exchanges between workers that all send quantised gradients."""
        keys = [
            random_key(self.seed, stream, step, flat.device)
            for stream in (dist.get_rank(route.there), _SERVER)
        ]
        slices = _slices(segments, self.quantizer.block_size)
        sizes = [sum(s.size for s in members) for members in slices]
        message_bytes = self.quantizer.num_bytes(segments)
        served = self.sides == 2 or self._serving_is_cheaper(
            flat.nbytes, message_bytes, _size(route.there)
        )
        exchange = self._through_servers if served else self._to_all
        return [
            exchange(part, members, keys, route)
            for part, members in zip(flat.split(sizes), slices, strict=True)
        ]

    def _to_all(
        self, flat: Tensor, segments: Sequence[Segment], keys: Sequence[Tensor], route: _Route
    ) -> Exchange:
        """Step 7 of Algorithm A1, and every worker decodes all messages."""
        message = self.quantizer.encode(flat, segments, keys[0])
        messages = message.new_empty(_size(route.there), len(message))
        yield _all_gather(messages, message, route.there, route.meter)
        self.quantizer.mean(messages, segments, out=flat)

    def _through_servers(
        self, flat: Tensor, segments: Sequence[Segment], keys: Sequence[Tensor], route: _Route
    ) -> Exchange:
        """Each worker takes the mean of its chunk of every gradient, and sends it to all."""
        quantizer, num_workers = self.quantizer, _size(route.there)
        rank = dist.get_rank(route.there)  # it serves part `rank`
        # Step 7: each server gets its part of every worker's gradient
        message = quantizer.encode_parts(flat, segments, keys[0], num_workers)
        received = Message(*map(torch.empty_like, message))
        yield All(
            _all_to_all(rows, sent, route.there, route.meter)
            for rows, sent in zip(received, message, strict=True)
        )
        own = quantizer.mean_of_part(received, segments, memory=flat)
        if self.sides == 1:  # the means go back in full
            reply = quantizer.part_in_full(own)
        else:  # Step 10: it quantises the mean
            reply = quantizer.encode_part(own, segments, keys[1], rank, num_workers)
        replies = Message(*(t.new_empty(num_workers, t.shape[1]) for t in reply))
        yield All(
            _all_gather(rows, sent[0], route.back, route.meter)
            for rows, sent in zip(replies, reply, strict=True)
        )
        # a server's own reply is decoded like everyone's, or ranks drift
        take = quantizer.place_parts if self.sides == 1 else quantizer.decode_parts
        take(replies, segments, out=flat)

    def _serving_is_cheaper(self, full_bytes: int, message_bytes: int, num_workers: int) -> bool:
        """Bytes that a worker sends: (M - 1) m to all, or (M - 1) / M (m + 4 d) through servers.

        Both give the same mean; with blocks of whole tensors the servers' would be other blocks.
        """
        if self.quantizer.block_size is None:
            return False
        return num_workers * message_bytes > message_bytes + full_bytes


class _Shares:
    """A gradient cut into one share for each worker of a group, in fp32."""

    def __init__(self, flat: Tensor, chunks: list[list[Segment]]) -> None:
        self.flat, self.chunks = flat, chunks
        self.sizes = [sum(s.size for s in chunk) for chunk in chunks]

    def scatter_mean(self, group: dist.ProcessGroup | None, meter: Meter) -> Tensor:
        """This worker's share, averaged: [sizes[rank]]."""
        num_workers, own = _size(group), self.sizes[dist.get_rank(group)]
        received = self.flat.new_empty(num_workers, own)
        meter.sent(self.flat.nbytes - 4 * own, inside_machine=True)
        sizes = [own] * num_workers
        dist.all_to_all_single(received.view(-1), self.flat, sizes, self.sizes, group=group)
        return received.sum(dim=0).mul_(1.0 / num_workers)

    def gather(self, share: Tensor, group: dist.ProcessGroup | None, meter: Meter) -> None:
        """Put everyone's averaged share back in its place."""
        rows = share.new_empty(len(self.sizes), max(self.sizes))
        own = _padded(share, max(self.sizes))
        _all_gather(rows, own, group, meter, inside=True).wait()
        for row, size, out in zip(rows, self.sizes, self.flat.split(self.sizes), strict=True):
            out.copy_(row[:size])


def _mean_in_machine(rows: Tensor, workers: Workers, meter: Meter) -> Tensor:
    """[M, n], a row for each worker -> [machines, n], for those at this one's place on each."""
    places = workers.places
    sent = torch.stack([rows[i] for same in places for i in same]).view(len(places), -1)
    received = torch.empty_like(sent)
    meter.sent(rows.nbytes - received[0].nbytes, inside_machine=True)
    dist.all_to_all_single(received.view(-1), sent.view(-1), group=workers.node)
    return received.sum(dim=0).mul_(1.0 / len(places)).view(len(places[0]), -1)


def _slices(segments: Sequence[Segment], block_size: int | None) -> list[list[Segment]]:
    """Cut a gradient into runs of about `_SLICE` elements; a whole tensor's block stays whole."""
    if block_size is None:
        return [list(segments)]
    parts = -(-sum(s.size for s in segments) // _SLICE)
    return [part for part in split(segments, parts, block_size) if part]


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group)


def _padded(values: Tensor, size: int) -> Tensor:
    if values.numel() == size:
        return values
    return torch.cat([values, values.new_zeros(size - values.numel())])


def _all_gather(
    rows: Tensor,
    message: Tensor,
    group: dist.ProcessGroup | None,
    meter: Meter,
    *,
    inside: bool = False,
) -> dist.Work:
    """message: [n], of one size on every rank -> rows: [M, n]."""
    meter.sent((len(rows) - 1) * message.nbytes, inside_machine=inside)
    flat = rows.view(-1).view(torch.uint8)
    work = all_gather_tensor(flat, message.view(torch.uint8), group=group, async_op=True)
    return _sent(work)


def _all_to_all(
    rows: Tensor, message: Tensor, group: dist.ProcessGroup | None, meter: Meter
) -> dist.Work:
    """message: [M, n], row i for rank i -> rows: [M, n], row i from rank i."""
    meter.sent((len(rows) - 1) * message[0].nbytes)
    there, here = (t.view(-1).view(torch.uint8) for t in (message, rows))
    return _sent(dist.all_to_all_single(here, there, group=group, async_op=True))


def _sent(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this process is no member of the group"
    return work


COLLECTIVES: dict[str, type[AllReduce] | type[QSGD]] = {"allreduce": AllReduce, "qsgd": QSGD}
