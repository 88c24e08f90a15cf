"""A protocol in DistributedDataParallel: the hook, and who runs it beside the backward."""

# no `from __future__ import annotations`: DDP compares the hook's annotations as objects

import logging
import queue
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from robust_accel.comm.base import Collective, GradientCompression, averaged
from robust_accel.comm.quantizer import Segment, segment
from robust_accel.comm.workers import Workers

logger = logging.getLogger(__name__)


class DDPCompression(GradientCompression):
    """A protocol as the communication hook of one DDP model."""

    def __init__(
        self,
        model: DistributedDataParallel,
        collective: Collective,
        group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        self._collective = collective
        self._worker: _Worker | None = None
        self._stream: torch.cuda.Stream | None = None
        # keyed by parameter: DDP rebuilds its buckets after the first iteration
        self._positions: dict[int, int] = {}
        position = 0
        for parameter in model.module.parameters():
            self._positions[id(parameter)] = position
            position += parameter.numel()
        device = next(p for p in model.module.parameters() if p.requires_grad).device
        backend = dist.get_backend(model.process_group)
        if device.type == "cpu":
            self._worker = _Worker()
        elif device.type == "cuda" and backend != "gloo":
            # the model's own group: two NCCL communicators at work at once can deadlock
            group = group or model.process_group
            self._stream = torch.cuda.Stream(device)
        else:
            raise ValueError(
                f"compress_gradients supports CPU, and CUDA with NCCL; got {device.type} with "
                f"{backend}"
            )
        self._workers = Workers.of(group, parent=model.process_group)
        model.register_comm_hook(self, _hook)

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
            return self._averaged(buffer, segments, step)

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
                result = self._averaged(buffer, segments, step)
            # a future with devices records this stream, and DDP's stream will wait for it
            future = torch.futures.Future[torch.Tensor](devices=[buffer.device])
            future.set_result(result)
        return future

    def _averaged(self, buffer: Tensor, segments: list[Segment], step: int) -> Tensor:
        # into DDP's own memory: with gradient_as_bucket_view the gradients live there
        return averaged(self._collective, buffer, segments, step, self._workers, self.meter)


def _hook(state: DDPCompression, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return state._launch(bucket)


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
