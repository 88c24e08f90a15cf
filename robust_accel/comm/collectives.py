"""Who sends what: protocols that turn each worker's gradient into the mean on every worker.

They know nothing of DDP or DeepSpeed. Every rank decodes the same bytes with the same operations
in the same order, so that parameters stay bit-identical across ranks.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from pydantic import Field, PositiveInt
from torch import Tensor

from robust_accel.comm.meter import Meter
from robust_accel.comm.quantizer import BlockNorm, Quantizer, Segment, random_key, split
from robust_accel.settings import Settings

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# torch 2.14 renamed it and warns about the name that older ones know
_all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_SERVER = -1  # the random stream of means: it does not depend on which rank serves a chunk


class Collective(Protocol):
    """A protocol; its public fields are the recipe's keys."""

    def reduce(
        self,
        flat: Tensor,
        segments: Sequence[Segment],
        step: int,
        group: dist.ProcessGroup | None,
        meter: Meter,
    ) -> Tensor:
        """Average a gradient over the group.

        Args:
            flat: [d] fp32, this worker's gradient; may be overwritten.
            segments: the parameter tensors that lie end to end in `flat`, the same on every rank.
            step: number of the training step, the same on every rank; seeds the rounding.
            group: the process group; None is the default one.
            meter: counts the bytes that this rank sends.

        Returns:
            [d] fp32, the mean, bit-identical on every rank.
        """
        ...


class AllReduce(Settings):
    """The uncompressed baseline (the 32-bit rows of Table 4), or a cast to half precision."""

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"

    def reduce(
        self,
        flat: Tensor,
        segments: Sequence[Segment],
        step: int,
        group: dist.ProcessGroup | None,
        meter: Meter,
    ) -> Tensor:
        """See `Collective.reduce`. A ring sends 2 (M - 1) / M of the gradient."""
        world_size = dist.get_world_size(group)
        # multiplied before the sum: DDP's own order, and a sum of halves overflows less
        mean = flat.mul_(1.0 / world_size).to(_DTYPES[self.dtype])
        dist.all_reduce(mean, group=group)
        meter.sent(2 * (world_size - 1) * mean.nbytes / world_size)
        return mean.to(torch.float32)


class QSGD(Settings):
    """Quantised gradients: (A5)-(A6) of DAT, arXiv 2206.06257, block-wise and packed.

    Args:
        bits: bits an element, scales and signs apart.
        sides: 1 sends every gradient to every worker (step 7 of Algorithm A1, the paper's
            Ring-AllReduce setting); 2 also quantises the mean (step 10), with every worker the
            server of 1/M of the gradient.
        norm: "max" (default) or the paper's "l2" with s = 2^bits levels.
        block_size: elements that share a norm: 256, or 128 below 8 bits, where not given; null is
            a whole tensor. The paper takes the whole gradient, which DDP never holds at once.
            With `sides: 2` null is 1/M of a tensor, or one server would carry it alone.
        seed: of the stochastic rounding.
        compile: fuse the arithmetic with torch.compile.
    """

    bits: Literal[16, 8, 4, 2] = 8
    sides: Literal[1, 2] = 2
    norm: BlockNorm = "max"
    block_size: Literal["auto"] | PositiveInt | None = "auto"
    seed: int = Field(default=0, ge=0)
    compile: bool = False

    @property
    def quantizer(self) -> Quantizer:
        block_size = self.block_size
        if block_size == "auto":
            block_size = 256 if self.bits >= 8 else 128
        return Quantizer(self.bits, self.norm, block_size, self.compile)

    def reduce(
        self,
        flat: Tensor,
        segments: Sequence[Segment],
        step: int,
        group: dist.ProcessGroup | None,
        meter: Meter,
    ) -> Tensor:
        """See `Collective.reduce`."""
        if flat.numel() == 0:
            return flat
        exchange = self._one_sided if self.sides == 1 else self._two_sided
        return exchange(flat, segments, step, group, meter)

    def _one_sided(
        self,
        flat: Tensor,
        segments: Sequence[Segment],
        step: int,
        group: dist.ProcessGroup | None,
        meter: Meter,
    ) -> Tensor:
        key = random_key(self.seed, dist.get_rank(group), step, flat.device)
        message = self.quantizer.encode(flat, segments, key)
        return self._mean(_all_gather(message, group, meter), segments)

    def _two_sided(
        self,
        flat: Tensor,
        segments: Sequence[Segment],
        step: int,
        group: dist.ProcessGroup | None,
        meter: Meter,
    ) -> Tensor:
        quantizer = self.quantizer
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        chunks = split(segments, world_size, quantizer.block_size)  # chunk i is served by rank i
        num_bytes = [quantizer.num_bytes(chunk) for chunk in chunks]

        # Step 7 of Algorithm A1: each server gets its chunk of every worker's gradient.
        key = random_key(self.seed, rank, step, flat.device)
        pieces = flat.split([sum(s.size for s in chunk) for chunk in chunks])
        messages = [quantizer.encode(p, c, key) for p, c in zip(pieces, chunks, strict=True)]
        received = messages[rank].new_empty(world_size, num_bytes[rank])
        receive_sizes = [num_bytes[rank]] * world_size
        dist.all_to_all_single(
            received.view(-1), torch.cat(messages), receive_sizes, num_bytes, group=group
        )
        meter.sent(sum(num_bytes) - num_bytes[rank])

        # Step 10: it quantises the mean. Its own copy is decoded like everyone's, or ranks drift.
        key = random_key(self.seed, _SERVER, step, flat.device)
        reply = quantizer.encode(self._mean(received, chunks[rank]), chunks[rank], key)
        padded = torch.cat([reply, reply.new_zeros(max(num_bytes) - reply.numel())])
        replies = _all_gather(padded, group, meter)
        return torch.cat(
            [
                quantizer.decode(row[:n], chunk)
                for row, n, chunk in zip(replies, num_bytes, chunks, strict=True)
            ]
        )

    def _mean(self, messages: Tensor, segments: Sequence[Segment]) -> Tensor:
        """messages: [M, bytes] uint8 -> [d] fp32, summed in rank order."""
        total = self.quantizer.decode(messages[0], segments)
        for message in messages[1:]:
            total += self.quantizer.decode(message, segments)
        return total.mul_(1.0 / len(messages))


def _all_gather(message: Tensor, group: dist.ProcessGroup | None, meter: Meter) -> Tensor:
    """message: [bytes] of one size on every rank -> [M, bytes]."""
    world_size = dist.get_world_size(group)
    gathered = message.new_empty(world_size, message.numel())
    _all_gather_tensor(gathered.view(-1), message, group=group)
    meter.sent((world_size - 1) * message.numel())
    return gathered


COLLECTIVES: dict[str, type[AllReduce] | type[QSGD]] = {"allreduce": AllReduce, "qsgd": QSGD}
