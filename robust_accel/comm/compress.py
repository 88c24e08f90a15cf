"""The one call that puts a protocol into a prepared model: DDP, FSDP2 or DeepSpeed."""

import logging
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from robust_accel.comm.base import Collective, GradientCompression
from robust_accel.comm.collectives import AllReduce
from robust_accel.comm.ddp import DDPCompression
from robust_accel.comm.deepspeed import DeepSpeedCompression, is_engine, tell_layers
from robust_accel.comm.fsdp2 import FSDP2Compression

logger = logging.getLogger(__name__)


def compress_gradients(
    model: nn.Module,
    collective: Collective | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> GradientCompression:
    """Send a model's gradients by `collective` from now on, and count what that costs.

    Under DeepSpeed's ZeRO 1 and 2 it also tells this package's LAMB where each layer lies in the
    flat shards that ZeRO makes of the parameters, so that LAMB stays layer-wise.

    Args:
        model: what `accelerator.prepare()` returned, before its first backward: a
            DistributedDataParallel model, a DeepSpeed engine (ZeRO 0, 1 or 2), or what FSDP2
            (`fully_shard`) has sharded, or holds such.
        collective: the protocol; None is the uncompressed all-reduce, counted.
        group: process group to send on under DDP. On CPU (gloo) nothing else may use it; by
            default one is made, which every rank of the model must take part in. Under FSDP2,
            where a model is sharded over some of the processes: those that hold the same shards.

    Returns:
        The counts (`.meter`) and the step (`.state_dict()`, to be saved with a checkpoint). On one
        process nothing is sent: `collective` is ignored, which is said, and the counts stay zero.

    Raises:
        ValueError: several processes but no model of such an engine, ZeRO 3, FSDP1, a version or
            setting of DeepSpeed or FSDP2 that is not supported, or an unsupported device.
    """
    collective = AllReduce() if collective is None else collective
    model = getattr(model, "_orig_mod", model)  # torch.compile around DDP
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    in_pieces = any(isinstance(module, FSDPModule) for module in model.modules())
    if getattr(collective, "weight_bits", None) is not None and not in_pieces:
        raise ValueError(
            "weight_bits: weights are gathered under FSDP2 alone: leave it out, or call "
            "fully_shard before compress_gradients"
        )
    if is_engine(model):
        tell_layers(model)
        if group is not None:
            raise ValueError("group: a DeepSpeed engine has processes of its own: leave it out")
        if num_processes > 1:
            return DeepSpeedCompression(model, collective)
    elif isinstance(model, DistributedDataParallel):
        if getattr(model, "_comm_hooks", None):
            name = getattr(model._comm_hooks[0][0], "__name__", "one")
            raise ValueError(
                f"the model's gradients have a communication hook already ({name}): call "
                "compress_gradients once, and leave Accelerate's comm_hook out"
            )
        own, other = map(_ranks, (model.process_group, group or model.process_group))
        if own != other:
            raise ValueError(
                f"group: its ranks are {other}, and the model's {own}, over which DDP averages: "
                "make one of these, or leave it out"
            )
        if len(own) > 1:
            return DDPCompression(model, collective, group)
    elif any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "compress_gradients does not support FSDP1 (FullyShardedDataParallel): use FSDP2 "
            "(fully_shard; Accelerate: fsdp_version: 2)"
        )
    elif num_processes > 1 and in_pieces:
        scatters: Any = collective
        if not hasattr(collective, "scatter"):
            raise ValueError(
                f"{type(collective).__name__} has no scatter(), by which FSDP2's gradients are "
                "exchanged: see robust_accel.comm.base.ShardingCollective"
            )
        return FSDP2Compression(model, scatters, group)
    elif num_processes > 1:
        raise ValueError(
            f"on {num_processes} processes compress_gradients needs a DistributedDataParallel or "
            f"FSDP2 model or a DeepSpeed engine, got {type(model).__name__}: call "
            "accelerator.prepare(model) before it"
        )
    if collective != AllReduce():
        logger.warning("communication: %r is ignored on one process", collective)
    return GradientCompression()


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return sorted(dist.get_process_group_ranks(group))
