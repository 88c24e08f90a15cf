"""A protocol in a DeepSpeed engine, and LAMB's layers in the flat shards of its ZeRO optimizer.

DeepSpeed has no hook for either (its issue 886): the methods that reduce gradients are replaced on
the engine or optimizer object, after a check that they are what this file knows. Written against
DeepSpeed 0.19.8.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robust_accel.comm.base import Collective, GradientCompression, averaged
from robust_accel.comm.layout import Segment, segment
from robust_accel.comm.workers import Workers

_ENGINE_METHODS = {"allreduce_bucket": ("bucket", "dp_group", "dp_world_size")}
_ZERO_METHODS = {
    "allreduce_bucket": (
        "bucket", "communication_data_type", "rank", "log", "divide", "process_group",
    ),
    "gradient_reduction_w_predivide": ("tensor", "communication_data_type"),
    "average_tensor": ("tensor", "communication_data_type"),
}  # fmt: skip
_OF_ZERO_3 = (
    "zero_quantized_gradients", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_hpz_partition_size", "offload_param",
)  # fmt: skip


def is_engine(model: nn.Module) -> bool:
    """Whether a model is a DeepSpeed engine; DeepSpeed itself need not be installed."""
    return any(
        cls.__name__ == "DeepSpeedEngine" and cls.__module__.startswith("deepspeed.")
        for cls in type(model).__mro__
    )


def skip_inference_kernel() -> None:
    """Spare CPUs a C++ collective that DeepSpeed compiles at its first start, for inference."""
    import deepspeed

    # a later DeepSpeed without this table compiles, which costs a minute and nothing else
    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


def tell_layers(engine: Any) -> None:
    """Tell a layer-wise optimizer under ZeRO 1 or 2 which pieces of layers its shards hold.

    ZeRO replaces each parameter group by this rank's slice of all its tensors laid end to end.
    An optimizer with a method `shard` (LAMB) learns from it where the layers lie, and how to sum
    over the ranks. Any other optimizer, and any other stage, is left alone.
    """
    zero = engine.optimizer
    if engine.zero_optimization_stage() not in (1, 2) or not hasattr(zero.optimizer, "shard"):
        return
    if not hasattr(zero, "single_partition_of_fp32_groups"):
        raise ValueError(
            f"LAMB does not know which layers lie in the shards of DeepSpeed's "
            f"{type(zero).__name__} (ZeRO 1 in bf16 with gradients accumulated in fp32): use ZeRO "
            "2, or torch_autocast instead of bf16"
        )
    for i, flat in enumerate(zero.single_partition_of_fp32_groups):
        group = zero.real_dp_process_group[i]
        rank = dist.get_rank(group)
        sources, targets = zero.grad_start_offset[i], zero.grad_partition_insertion_offset[i]
        pieces = []
        for layer, parameter in enumerate(zero.bit16_groups[i]):
            key = zero.get_param_id(parameter)
            if key in sources.get(rank, {}):
                start = int(targets[rank][key])
                size = min(parameter.numel() - int(sources[rank][key]), flat.numel() - start)
                pieces.append(_Piece(layer, start, size, parameter.ndim))
        zero.optimizer.shard(flat, pieces, len(zero.bit16_groups[i]), _sum_over(group))


class _Piece(NamedTuple):
    """Part of a layer in this rank's shard."""

    layer: int  # index in its group, the same on every rank
    start: int
    size: int
    ndim: int  # of the whole layer


def _sum_over(group: dist.ProcessGroup | None) -> Callable[[Tensor], Tensor]:
    def total(values: Tensor) -> Tensor:
        dist.all_reduce(values, group=group)
        return values

    return total


@contextmanager
def weights_only_loads() -> Iterator[None]:
    """Let DeepSpeed load a checkpoint without executing what its pickles name.

    It asks torch to load anything. Here torch gets values and tensors only, and the classes of
    DeepSpeed's own that its checkpoints hold.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(known):
            yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def passed_over(zero: Mapping[str, Any]) -> str | None:
    """A setting of `zero_optimization` that only ZeRO 3 has, and DeepSpeed else passes over."""
    for name in _OF_ZERO_3:
        found = zero.get(name)
        asked = found.get("device") if isinstance(found, Mapping) else found
        if asked is True or asked not in (None, 0, 1, "none"):
            return f"{name}: {getattr(asked, 'value', asked)}"
    return None


class _Span(NamedTuple):
    """Where a parameter lies in the bucket that ZeRO is reducing."""

    start: int
    end: int
    raw: bool


class DeepSpeedCompression(GradientCompression):
    """A protocol in place of one engine's gradient reduction: ZeRO 0, 1 and 2.

    ZeRO 1 and 2 keep a slice of the mean that every rank gets, as DeepSpeed's own all-reduce does;
    their exchange of parameters after a step stays in full precision and is not counted.
    """

    def __init__(self, engine: Any, collective: Collective) -> None:
        super().__init__()
        _check_supported(engine)
        self._engine, self._collective = engine, collective
        self._exchanges = (-1, 0)  # the engine's step, and how many there were in it
        group = engine.data_parallel_group
        self._workers = Workers.of(group or dist.group.WORLD, parent=group)
        self._bucket: list[_Span] = []  # while ZeRO reduces one
        self._bucket_offset = 0
        if engine.zero_optimization_stage() == 0:
            engine.allreduce_bucket = self._engine_bucket
            return
        zero = engine.optimizer
        zero.gradient_average = False  # what comes back is the mean
        zero.allreduce_bucket = self._zero_bucket
        zero.gradient_reduction_w_predivide = self._zero_tensor
        zero.average_tensor = self._with_layout(zero, zero.average_tensor)

    def close(self) -> None:
        """Release the groups; an exchange raises afterwards."""
        super().close()
        self._workers.close()

    def _engine_bucket(self, bucket: Sequence[Tensor], *_: Any, **__: Any) -> Tensor:
        """Stands for the engine's allreduce_bucket: tensors to one flat mean."""
        return self._averaged(torch.cat([t.reshape(-1) for t in bucket]), _by_shape(bucket))

    def _zero_bucket(
        self, bucket: Sequence[Tensor], communication_data_type: torch.dtype, *_: Any, **__: Any
    ) -> Tensor:
        """Stands for the ZeRO optimizer's allreduce_bucket: slices of its bucket, or gradients."""
        segments = self._by_layout(bucket) if self._bucket else _by_shape(bucket)
        flat = torch.cat([t.reshape(-1) for t in bucket])
        return self._averaged(flat.to(communication_data_type), segments)

    def _zero_tensor(self, tensor: Tensor, communication_data_type: torch.dtype) -> Tensor:
        """Stands for gradient_reduction_w_predivide (`reduce_scatter: false`): in place."""
        return tensor.copy_(self._zero_bucket([tensor], communication_data_type))

    def _with_layout(self, zero: Any, average_tensor: Callable[..., None]) -> Callable[..., None]:
        """average_tensor as it is, but which parameters lie where in its bucket is noted."""

        def noted(tensor: Tensor, communication_data_type: torch.dtype) -> None:
            start = 0
            for group, place, _ in zero.ipg_buckets[communication_data_type].params:
                parameter = zero.bit16_groups[group][place]
                whole = segment(parameter.shape, start)
                self._bucket.append(_Span(start, start + whole.size, whole.raw))
                start += whole.size
            self._bucket_offset = int(tensor.storage_offset())
            try:
                average_tensor(tensor, communication_data_type)
            finally:
                self._bucket = []

        return noted

    def _by_layout(self, slices: Sequence[Tensor]) -> list[Segment]:
        """Segments of slices of the bucket: a slice may hold several parameters, or part of one."""
        segments = []
        for piece in slices:
            start = int(piece.storage_offset()) - self._bucket_offset
            end = start + piece.numel()
            for span in self._bucket:
                low, high = max(start, span.start), min(end, span.end)
                if low < high:
                    segments.append(Segment(high - low, low, span.raw))
        assert sum(s.size for s in segments) == sum(piece.numel() for piece in slices)
        return segments

    def _averaged(self, flat: Tensor, segments: list[Segment]) -> Tensor:
        self._refuse_if_closed()
        # each exchange has its own random numbers, which go on where the engine does
        at, number = int(self._engine.global_steps), 0
        if self._exchanges[0] == at:
            number = self._exchanges[1]
        self._exchanges = (at, number + 1)
        step = self.steps = (at << 20) + number
        # the engine waits here; with overlap_comm, exposed seconds are an upper bound
        with torch.no_grad(), self.meter.timed_on(flat.device, exposed=True):
            return averaged(self._collective, flat, segments, step, self._workers, self.meter)


def _by_shape(tensors: Sequence[Tensor]) -> list[Segment]:
    segments = []
    position = 0
    for tensor in tensors:
        segments.append(segment(tensor.shape, position))
        position += tensor.numel()
    return segments


def _check_supported(engine: Any) -> None:
    """Raise ValueError for stages, settings and versions that this file does not know."""
    stage = int(engine.zero_optimization_stage())
    if stage == 3:
        raise ValueError(
            "compress_gradients supports ZeRO 0, 1 and 2, got stage 3, which gathers parameters "
            "in every pass: use FSDP2, which cuts weights as well. (DeepSpeed's own ZeRO++, "
            "zero_quantized_gradients and zero_quantized_weights, goes without this package's "
            "exchange and LAMB)"
        )
    if over := passed_over(engine._config.zero_config.model_dump()):
        raise ValueError(
            f"compress_gradients: DeepSpeed passes over {over} at ZeRO {stage}: leave it out"
        )
    for what, found in (
        ("pipeline parallelism", getattr(engine, "pipeline_parallelism", False)),
        ("mixture-of-experts layers", getattr(engine, "has_moe_layers", False)),
        ("sequence parallelism", getattr(engine, "sequence_parallel_size", 1) > 1),
        ("gradients that are summed (gradient_average false)", not engine.gradient_average),
        ("ZenFlow", getattr(engine.optimizer, "zenflow", False)),
    ):
        if found:
            raise ValueError(f"compress_gradients does not support DeepSpeed with {what}")
    owner, methods = (engine, _ENGINE_METHODS) if stage == 0 else (engine.optimizer, _ZERO_METHODS)
    for name, expected in methods.items():
        method = getattr(owner, name, None)
        known = method and tuple(inspect.signature(method).parameters)
        if known != expected:
            raise ValueError(
                f"compress_gradients does not know DeepSpeed {version('deepspeed')}: "
                f"{type(owner).__name__}.{name} takes {known or 'nothing: it is missing'}, "
                f"expected {expected}, as in 0.19.8"
            )
