"""A protocol in DistributedDataParallel: the hook, and who runs it beside the backward."""

# no `from __future__ import annotations`: DDP compares the hook's annotations as objects

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from robust_accel.comm.agreement import same_bits
from robust_accel.comm.base import (
    Collective,
    Exchange,
    GradientCompression,
    Pipeline,
    averaged,
    averaging,
)
from robust_accel.comm.layout import Segment, segment
from robust_accel.comm.meter import Meter
from robust_accel.comm.workers import Workers, check_device

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
        check_device(device.type, model.process_group)
        if device.type == "cpu":
            self._worker = _Worker(self.meter)
        else:
            # the model's own group: two NCCL communicators at work at once can deadlock
            group = group or model.process_group
            self._stream = torch.cuda.Stream(device)
        self._workers = Workers.of(
            group, parent=model.process_group, replies=self._worker is not None
        )
        model.register_comm_hook(self, _hook)
        self._unsent = self._told = False
        self._steps_at_update = 0
        self._sent: dict[int, Tensor] = {}  # parameters of the first exchanges, by id
        self._model = weakref.ref(model)
        model.register_forward_pre_hook(self._before_forward)
        self._hooks = (
            register_optimizer_step_pre_hook(self._before_update),
            register_optimizer_step_post_hook(self._after_update),
        )

    def _before_forward(self, model: DistributedDataParallel, _: object) -> None:
        self._unsent |= torch.is_grad_enabled() and not model.require_backward_grad_sync

    def _before_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not _has_closure(args, kwargs):
            self._check(optimizer)

    def _after_update(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if _has_closure(args, kwargs):  # in which the backward was
            self._check(optimizer)

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        """Of every optimizer in this process: what it steps on must have been exchanged."""
        if self._model() is None:  # it is gone, and others may have its parameters' ids
            return  # (a hook that removed itself here would break the loop over all of them)
        own = self._positions
        if not any(id(p) in own for g in optimizer.param_groups for p in g["params"]):
            return
        # accumulating ends with a backward that is sent
        if self._unsent and self.steps == self._steps_at_update:
            raise RuntimeError(
                "an optimizer step was to be made whose gradients were not exchanged: its forward "
                "ran in no_sync(), as under Accelerate's LocalSGD, with which compress_gradients "
                "cannot be used"
            )
        self._unsent, self._steps_at_update = False, self.steps
        if self._sent and not self._told:
            self._told = True
            self._tell()

    def _tell(self) -> None:
        """Say what the first exchange did.

        Raises:
            RuntimeError: The gradients are not the same on every rank.
        """
        grads = [p.new_zeros(1) if p.grad is None else p.grad for p in self._sent.values()]
        if not same_bits(grads, self._workers.group):
            raise RuntimeError(
                f"after the first exchange by {self._collective!r} gradients differ between ranks"
            )
        logger.info(
            "gradients of %d tensors exchanged by %r, equal on %d ranks; %d bytes sent",
            len(grads),
            self._collective,
            self._workers.size,
            self.meter.bytes_sent,
        )
        self._sent.clear()

    def close(self) -> None:
        """Release the thread and the groups; a synchronised backward raises afterwards."""
        super().close()
        for hook in self._hooks:
            hook.remove()
        if self._worker is not None:
            self._worker.close()
        self._workers.close()

    def _launch(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()  # [d]
        if buffer.is_sparse:
            raise ValueError("compress_gradients does not support sparse gradients")
        segments = [segment(p.shape, self._positions[id(p)]) for p in bucket.parameters()]
        self._refuse_if_closed()
        if not self._told:
            self._sent |= {id(p): p for p in bucket.parameters()}
        step, last = self.steps, bucket.is_last()
        self.steps += last
        if self._worker is None:
            return self._on_stream(buffer, segments, step, last)
        since = self.meter.arrived()
        arrived = since if last else None
        return self._worker.submit(lambda: self._parts(buffer, segments, step, arrived))

    def _parts(
        self, buffer: Tensor, segments: list[Segment], step: int, arrived: float | None
    ) -> "_Parts":
        exchanges, finish = averaging(
            self._collective, buffer, segments, step, self._workers, self.meter
        )

        def finish_counted() -> Tensor:
            mean = finish()
            if arrived is not None:
                self.meter.exposed(since=arrived)
            return mean

        return exchanges, finish_counted

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
                result = averaged(
                    self._collective, buffer, segments, step, self._workers, self.meter
                )
            # a future with devices records this stream, and DDP's stream will wait for it
            future = torch.futures.Future[torch.Tensor](devices=[buffer.device])
            future.set_result(result)
        return future


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an optimizer's step was called with one; the first argument is the optimizer."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None) is not None


def _hook(state: DDPCompression, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    return state._launch(bucket)


# the exchanges of a bucket, and what makes its future's value after them
_Parts: TypeAlias = tuple[Sequence[Exchange], Callable[[], Tensor]]
_Job: TypeAlias = tuple[Callable[[], _Parts], torch.futures.Future]


class _Worker:
    """One thread that exchanges buckets, in the order in which they came: the same on every rank.

    On gloo a collective inside `Future.then` deadlocks, as callbacks run on gloo's own threads.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._begun: list[torch.futures.Future] = []
        self._ended: list[tuple[torch.futures.Future, Tensor | BaseException]] = []
        self._pipeline = Pipeline()
        self._error: BaseException | None = None
        # daemon: a peer that never answers must not keep this process alive
        self._thread = threading.Thread(target=self._run, name="gradient-sender", daemon=True)
        self._thread.start()

    def submit(self, begin: Callable[[], _Parts]) -> torch.futures.Future[torch.Tensor]:
        future: torch.futures.Future = torch.futures.Future()
        result = future.then(_result_or_raise)
        self._jobs.put((begin, future))
        return result

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(timeout=5)

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(block=not self._pipeline)
            except queue.Empty:
                self._attempt(self._pipeline.advance)
                continue
            if job is None:
                self._attempt(self._pipeline.finish)
                return
            begin, future = job
            self._begun.append(future)
            self._attempt(self._begin, begin, future)

    def _begin(self, begin: Callable[[], _Parts], future: torch.futures.Future) -> None:
        if self._error is not None:
            raise self._error
        exchanges, finish = begin()
        left = len(exchanges)

        def counted(exchange: Exchange) -> Exchange:
            nonlocal left
            yield from exchange
            left -= 1
            if not left:
                self._end(future, finish())

        for exchange in exchanges:
            self._pipeline.add(counted(exchange))
        if not exchanges:
            self._end(future, finish())

    def _end(self, future: torch.futures.Future, outcome: Tensor | BaseException) -> None:
        self._begun.remove(future)
        self._ended.append((future, outcome))

    def _attempt(self, work: Callable[..., None], *arguments: Any) -> None:
        """Work on exchanges; then, when all is counted, tell whoever waits for those that ended."""
        try:
            work(*arguments)
        except BaseException as error:
            if self._error is None:
                logger.error("gradient communication failed: %r", error)
            # later jobs fail too: their collectives would no longer match other ranks'
            self._error = error
            self._pipeline.clear()
            for future in list(self._begun):
                self._end(future, error)
        for future, outcome in self._ended:
            self._meter.left()
            future.set_result(outcome)
        self._ended.clear()


def _result_or_raise(future: torch.futures.Future) -> Tensor:
    # Future.set_exception would not do: DDP takes the exception for a tensor and hides its message
    outcome = future.value()
    if isinstance(outcome, BaseException):
        raise RuntimeError(f"gradient communication failed: {outcome!r}") from outcome
    return outcome
