"""The Accelerator of a training run, with DeepSpeed's settings taken from the recipe."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast,
)
from torch import Tensor, nn

from robust_accel.comm.deepspeed import skip_inference_kernel
from robust_accel.comm.restarts import join_restartable
from robust_accel.recipe import TrainSettings
from robust_accel.training.launcher import check_engine, launched_processes

LATER = 10.0  # seconds that a collective waits beyond train.timeout: the heartbeat tells more


def create_accelerator(settings: TrainSettings, precision: str, project_dir: Path) -> Accelerator:
    """Join the other processes, as the launcher says: DDP, DeepSpeed or alone.

    Under DeepSpeed (``accelerate launch --config_file recipes/accelerate/zero2.yaml``) the launch
    configuration chooses the ZeRO stage, and the recipe everything that both could set: batch size,
    gradient accumulation, clipping and precision. Half precision is torch's autocast there too,
    with fp32 weights.

    Args:
        settings: The recipe's ``train`` section.
        precision: Accelerate's ``mixed_precision``.
        project_dir: Where trackers write.

    Raises:
        ValueError: The processes are not joined, the launcher asks for what the recipe says
            otherwise, or the engine cannot leave out a step, as ``train.on_nonfinite`` asks.
    """
    with_deepspeed, micro_batch_size = check_engine(settings)
    (group,) = (with_deepspeed and deepspeed_without_gpu()) or [InitProcessGroupKwargs()]
    limit = settings.timeout + LATER
    group.timeout = timedelta(seconds=limit)
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    on_gpu = torch.cuda.is_available() and not on_cpu
    join_restartable("nccl" if on_gpu else "gloo", limit)
    accelerator = Accelerator(
        mixed_precision="no" if with_deepspeed else precision,
        # as a number the environment's would win, which may be auto
        gradient_accumulation_plugin=GradientAccumulationPlugin(settings.gradient_accumulation),
        log_with=list(settings.log_with) or None,
        project_dir=str(project_dir),
        kwargs_handlers=[group],
    )
    started = launched_processes()
    if accelerator.num_processes != started:
        raise ValueError(
            f"the launcher has started {started} processes, and Accelerate joins "
            f"{accelerator.num_processes}: without GPUs it does with ACCELERATE_USE_CPU=true"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = micro_batch_size
        config["gradient_accumulation_steps"] = settings.gradient_accumulation
        config["gradient_clipping"] = settings.max_grad_norm or 0.0
        if precision != "no":
            dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
            config["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return accelerator


def choose_precision(precision: str) -> str:
    """Accelerate's ``mixed_precision``: ``auto`` is bf16 where the device computes in it."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision: fp16 needs a GPU, found none; allowed: auto, fp32, bf16")
    if precision == "auto":
        if torch.cuda.is_available():
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
            native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        precision = "bf16" if native else "fp32"
    return "no" if precision == "fp32" else precision


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """``train.deterministic``, from before the first use of a GPU on.

    Raises:
        ValueError: The training needs what torch has no such kernel for.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" in str(error):
            raise ValueError(f"train.deterministic: {error}") from error
        raise
    finally:
        torch.use_deterministic_algorithms(before)


def deepspeed_without_gpu() -> list[Any]:
    """Accelerate's ``kwargs_handlers`` for DeepSpeed on CPUs; none where there is a GPU.

    Names gloo, without which Accelerate takes DeepSpeed on CPUs for a single process, and spares
    the first start a minute of compiling.
    """
    if torch.cuda.is_available():
        return []
    skip_inference_kernel()
    return [InitProcessGroupKwargs(backend="gloo")]


def share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Make the first process's BatchNorm statistics everyone's before each step, as DDP does.

    DeepSpeed and FSDP2 leave each process its own, though a checkpoint holds only one's, and the
    attack normalises by them.
    """
    due = True

    def before_forward(module: nn.Module, _: object) -> None:
        nonlocal due
        if module.training and due:
            broadcast_all(list(module.buffers()))
        due = accelerator.sync_gradients  # not between accumulated micro-batches, like DDP

    model.register_forward_pre_hook(before_forward)


def broadcast_all(tensors: list[Tensor]) -> None:
    """Make tensors the first process's; one message a type: a network has three buffers a layer."""
    for dtype in {tensor.dtype: None for tensor in tensors}:
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = broadcast(torch.cat([tensor.flatten() for tensor in same]))
        parts = flat.split([tensor.numel() for tensor in same])
        for tensor, part in zip(same, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
