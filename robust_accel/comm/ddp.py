"""Places a protocol in DistributedDataParallel: one call after `accelerator.prepare()`."""

# no `from __future__ import annotations`: DDP compares the hook's annotations as objects

import logging
import queue
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robust_accel.comm.collectives import AllReduce, Collective
from robust_accel.comm.meter import Meter
from robust_accel.comm.quantizer import Segment, segment

logger = logging.getLogger(__name__)


def compress_gradients(
    model: nn.Module,
    collective: Collective | None = None,
    *,
    group: dist.ProcessGroup | None = None,
) -> "GradientCompression":
    """Send a model's gradients by `collective` from now on, and count what that costs.

    Args:
        model: what `accelerator.prepare()` returned, before its first backward.
        collective: the protocol; None is the uncompressed all-reduce, counted.
        group: process group to send on. On CPU (gloo) nothing else may use it; by default one is
            made, which every rank of the model must take part in.

    Returns:
        The counts (`.meter`) and the step (`.state_dict()`, to be saved with a checkpoint). On one
        process nothing is sent: `collective` is ignored and the counts stay zero.

    Raises:
        ValueError: several processes but no DistributedDataParallel, or an unsupported device.
    """
    collective = AllReduce() if collective is None else collective
    model = getattr(model, "_orig_mod", model)  # torch.compile around DDP
    if not isinstance(model, DistributedDataParallel):
        num_processes = dist.get_world_size() if dist.is_initialized() else 1
        if num_processes > 1:
            raise ValueError(
                f"on {num_processes} processes compress_gradients needs a DistributedDataParallel "
                f"model, got {type(model).__name__}: call accelerator.prepare(model) before it"
            )
    elif dist.get_world_size(model.process_group) > 1:
        return GradientCompression(model, collective, group)
    if collective != AllReduce():
        logger.warning("communication: %r is ignored on one process", collective)
    return GradientCompression(None, collective, None)


class GradientCompression:
    """A protocol at work in one DDP model; `compress_gradients` makes it.

    Attributes:
        meter: bytes and seconds so far, of this rank.
        steps: synchronised backward passes so far; seeds the rounding, hence part of a checkpoint.
    """

    def __init__(
        self,
        model: DistributedDataParallel | None,
        collective: Collective,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.meter = Meter()
        self.steps = 0
        self._collective = collective
        self._group = group
        self._positions: dict[int, int] = {}
        self._worker: _Worker | None = None
        self._stream: torch.cuda.Stream | None = None
        if model is not None:
            self._attach(model)

    def _attach(self, model: DistributedDataParallel) -> None:
        # keyed by parameter: DDP rebuilds its buckets after the first iteration
        position = 0
        for parameter in model.module.parameters():
            self._positions[id(parameter)] = position
            position += parameter.numel()
        device = next(p for p in model.module.parameters() if p.requires_grad).device
        if device.type == "cpu":
            self._group = self._group or _own_group(model.process_group)
            self._worker = _Worker()
        elif device.type == "cuda" and dist.get_backend(model.process_group) != "gloo":
            # the model's own group: two NCCL communicators at work at once can deadlock
            self._group = self._group or model.process_group
            self._stream = torch.cuda.Stream(device)
        else:
            backend = dist.get_backend(model.process_group)
            raise ValueError(
                f"compress_gradients supports CPU, and CUDA with NCCL; got {device.type} with "
                f"{backend}"
            )
        model.register_comm_hook(self, _hook)

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]

    def close(self) -> None:
        """Stop the worker thread. The model cannot run a synchronised backward afterwards."""
        if self._worker is not None:
            self._worker.close()

    def _launch(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()  # [d]
        if buffer.is_sparse:
            raise ValueError("compress_gradients does not support sparse gradients")
        segments = [segment(p.shape, self._positions[id(p)]) for p in bucket.parameters()]
        step, last = self.steps, bucket.is_last()
        self.steps += last
        if self._worker is not None:
            arrived = time.perf_counter() if last else None
            return self._worker.submit(lambda: self._on_thread(buffer, segments, step, arrived))
        return self._on_stream(buffer, segments, step, last)

    def _on_thread(
        self, buffer: Tensor, segments: list[Segment], step: int, arrived: float | None
    ) -> Tensor:
        with self.meter.timed(exposed_since=arrived):
            return self._reduce(buffer, segments, step)

    def _on_stream(
        self, buffer: Tensor, segments: list[Segment], step: int, last: bool
    ) -> torch.futures.Future[torch.Tensor]:
        """NCCL: queue everything on a stream of its own; the host waits for nothing."""
        assert self._stream is not None
        arrived = torch.cuda.Event(enable_timing=True)
        arrived.record()
        self._stream.wait_event(arrived)
        with torch.no_grad(), torch.cuda.stream(self._stream):
            with self.meter.timed_stream(exposed_since=arrived if last else None):
                result = self._reduce(buffer, segments, step)
            # a future with devices records this stream, and DDP's stream will wait for it
            future = torch.futures.Future[torch.Tensor](devices=[buffer.device])
            future.set_result(result)
        return future

    def _reduce(self, buffer: Tensor, segments: list[Segment], step: int) -> Tensor:
        flat = buffer.to(torch.float32)
        mean = self._collective.reduce(flat, segments, step, self._group, self.meter)
        # into DDP's own memory: with gradient_as_bucket_view the gradients live there
        return buffer if mean is buffer else buffer.copy_(mean)


def _hook(
    state: GradientCompression, bucket: dist.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    return state._launch(bucket)


def _own_group(parent: dist.ProcessGroup) -> dist.ProcessGroup:
    """A gloo group with the same ranks and the same time limit."""
    ranks = dist.get_process_group_ranks(parent)
    subset = len(ranks) < dist.get_world_size()
    options = getattr(parent._get_backend(torch.device("cpu")), "options", None)
    timeout = getattr(options, "_timeout", None)
    group = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=subset)
    assert isinstance(group, dist.ProcessGroup)
    return group


class _Worker:
    """One thread that runs jobs in the order in which they came: the same on every rank.

    On gloo a collective inside `Future.then` deadlocks, as callbacks run on gloo's own threads.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Tensor], torch.futures.Future] | None] = (
            queue.SimpleQueue()
        )
        self._error: BaseException | None = None
        self._closed = False
        # daemon: a peer that never answers must not keep this process alive
        self._thread = threading.Thread(target=self._run, name="gradient-sender", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Tensor]) -> torch.futures.Future[torch.Tensor]:
        if self._closed:
            raise RuntimeError("gradient compression was closed: its model cannot train any more")
        future: torch.futures.Future = torch.futures.Future()
        result = future.then(_result_or_raise)
        self._jobs.put((job, future))
        return result

    def close(self) -> None:
        self._closed = True
        self._jobs.put(None)
        self._thread.join(timeout=5)

    @torch.no_grad()
    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            outcome: Tensor | BaseException | None = self._error
            if outcome is None:
                try:
                    outcome = job()
                except BaseException as error:
                    logger.exception("gradient communication failed")
                    # later jobs fail too: their collectives would no longer match other ranks'
                    outcome = self._error = error
            future.set_result(outcome)


def _result_or_raise(future: torch.futures.Future) -> Tensor:
    # Future.set_exception would not do: DDP takes the exception for a tensor and hides its message
    outcome = future.value()
    if isinstance(outcome, BaseException):
        raise RuntimeError(f"gradient communication failed: {outcome!r}") from outcome
    return outcome
