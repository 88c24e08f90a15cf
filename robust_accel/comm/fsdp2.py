"""A protocol in an FSDP2 model: its public hooks for collectives (torch 2.9 or newer).

FSDP2 hands over the gradients of one module's parameters as a matrix with a row for each worker:
row i holds the i-th chunk of every gradient, cut in its first dimension and filled up with zeros.
"""

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim.optimizer import register_optimizer_step_pre_hook

from robust_accel.comm.agreement import same_bits
from robust_accel.comm.base import GradientCompression, ShardingCollective, averaged
from robust_accel.comm.collectives import AllReduce, all_gather_tensor
from robust_accel.comm.draws import random_key
from robust_accel.comm.fsdp2_pieces import Pieces
from robust_accel.comm.meter import Meter
from robust_accel.comm.quantizer import Quantizer
from robust_accel.comm.workers import Workers, check_device

logger = logging.getLogger(__name__)
_WEIGHTS = -2  # the random stream of the first worker's; before it are gradients' and means'
_COMPRESSED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class FSDP2Compression(GradientCompression):
    """A protocol as the reduce-scatter of each module that `fully_shard` has got.

    Its all-gathers of parameters stay as they are, counted in `gathered`, or are quantised.

    Args:
        model: FSDP2's, or one that holds such.
        collective: The protocol.
        replicas: Those that hold the same shards as this process (HSDP), if any: the means are
            averaged over them by the protocol, too. Where only they are on several machines, what
            stays inside of one is not compressed.
    """

    def __init__(
        self, model: nn.Module, collective: ShardingCollective, replicas: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for module in modules:
            module.reshard()  # of whole parameters nothing tells the layout
        mesh = _mesh(model, modules)
        group = mesh.get_group()
        _check_replicas(group, replicas)
        check_device(mesh.device_type, group)
        # on CPUs the backward waits for each exchange
        self.meter.knows_exposed = mesh.device_type == "cpu"
        self.collective = collective
        self.workers = Workers.of(group, parent=group)
        self.replicas: Workers | None = None
        if replicas is not None:
            self.replicas = Workers.of(replicas, parent=replicas)
            shards = [p.to_local() for p in model.parameters() if isinstance(p, DTensor)]
            if not same_bits(shards, replicas):
                raise ValueError("replicas of the model differ: load the same weights into all")
        self.calls = [0] * len(modules)  # of each module's exchange
        self.rounding = 0  # of weights: the exchanges before the last optimizer step
        self.size = sum(p.requires_grad for p in model.parameters())
        self._own = {id(p) for p in model.parameters()}
        self._model, self._told = weakref.ref(model), False
        self._before_step = register_optimizer_step_pre_hook(self._before_update)
        position = 0
        for number, module in enumerate(modules):
            pieces = Pieces(module, position, group)
            position += pieces.num_elements
            exchange: Any = ReduceScatter(self, number, pieces)
            gather: Any = Gather(self, number, pieces)
            module.set_custom_reduce_scatter(exchange)
            module.set_custom_all_gather(gather)
            if replicas is not None:
                module.set_all_reduce_hook(exchange.over_replicas)
            _COMPRESSED.add(module)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"calls": list(self.calls), "rounding": self.rounding}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        calls = state.get("calls", [])
        if len(calls) != len(self.calls):  # of an earlier version, or cut otherwise
            calls = [self.steps] * len(self.calls)
        self.calls = list(calls)
        self.rounding = state.get("rounding", self.steps)

    def close(self) -> None:
        """Release the groups that were made; a synchronised backward raises afterwards."""
        super().close()
        self._before_step.remove()
        self.workers.close()
        if self.replicas is not None:
            self.replicas.close()

    def begin(self, number: int) -> int:
        """A module's exchange begins; returns its step."""
        self._refuse_if_closed()
        step = self.calls[number]
        self.calls[number] += 1
        self.steps = max(self.steps, self.calls[number])
        return step

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Of every optimizer in this process: weights are rounded anew; once, what was sent.

        Raises:
            RuntimeError: Nothing was.
        """
        if self._model() is None:
            return
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(p) in self._own and p.grad is not None for p in params):
            return
        self.rounding = self.steps
        if self._told:
            return
        if self.meter.bytes_sent == 0:
            raise RuntimeError(
                "an optimizer step was to be made whose gradients compress_gradients has not "
                "exchanged: FSDP2's reduce-scatter was set anew after it"
            )
        self._told = True
        logger.info(
            "gradients of %d tensors exchanged by %r, each shard's by its worker of %d%s; "
            "%d bytes sent",
            self.size,
            self.collective,
            self.workers.size,
            "" if self.replicas is None else f", over {self.replicas.size} replicas",
            self.meter.bytes_sent,
        )


class _OfModule:
    """What FSDP2 calls for one module, numbered; memory is as its own collectives take it."""

    def __init__(self, compression: FSDP2Compression, number: int, pieces: Pieces) -> None:
        self._compression, self._number, self._pieces = compression, number, pieces

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class ReduceScatter(_OfModule):
    """What FSDP2 calls for the gradients of one module's parameters, in its own stream."""

    _step = 0

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Average the rows of [M n] into [n], scaled as `op` says; queued like FSDP's own."""
        assert not async_op, "FSDP2 waits by its stream"
        own = self._compression
        scale = _scale(op, own.workers.size)
        self._step = own.begin(self._number)
        rows = input_tensor.view(own.workers.size, -1)
        chunks = self._pieces.rows(len(output_tensor), trained=True)
        workers = replace(own.workers, group=group)  # FSDP2 may have made one for this
        with torch.no_grad(), self._timed(input_tensor.device):
            if self._inside_machine():
                meter = Meter()
                AllReduce().scatter(rows, chunks, self._step, workers, meter, output_tensor)
                own.meter.sent(meter.bytes_sent, inside_machine=True)
            else:
                # odd numbers are for what follows
                step = 2 * self._step
                own.collective.scatter(rows, chunks, step, workers, own.meter, output_tensor)
            if scale != 1:
                output_tensor.mul_(scale)

    def over_replicas(self, reduce_output: Tensor) -> None:
        """Average [n] over the processes that hold the same shards."""
        own = self._compression
        assert own.replicas is not None
        if reduce_output.is_cuda:  # FSDP2 drops it while this stream still reads it
            reduce_output.record_stream(torch.cuda.current_stream())
        rows = self._pieces.rows(len(reduce_output), trained=True)
        segments = rows[dist.get_rank(own.workers.group)]
        step = 2 * self._step + 1
        with torch.no_grad(), self._timed(reduce_output.device):
            averaged(own.collective, reduce_output, segments, step, own.replicas, own.meter)

    def _timed(self, device: torch.device) -> Any:
        meter = self._compression.meter
        return meter.timed_on(device, exposed=meter.knows_exposed)

    def _inside_machine(self) -> bool:
        own = self._compression
        far = own.replicas is not None and own.replicas.num_machines > 1
        return far and own.workers.num_machines == 1


class Gather(_OfModule):
    """What FSDP2 calls to gather one module's weights: as it does, counted, or quantised.

    The rounding of weights changes with the optimizer's step, and not before: all passes of a step,
    an attack's and several of the outer loss as well, are by the same weights, and so is the
    resumed step.
    """

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> Any:
        own = self._compression
        collective: Any = own.collective
        quantizer: Quantizer | None = getattr(collective, "weight_quantizer", None)
        sent = own.gathered.sent
        others = dist.get_world_size(group) - 1
        is_part = others + 1 != own.workers.size  # of what was gathered, and rounded
        if quantizer is None or is_part or not input_tensor.is_floating_point():  # or bytes
            sent(others * input_tensor.nbytes)
            return all_gather_tensor(output_tensor, input_tensor, group, async_op)
        rank = dist.get_rank(group)
        segments = self._pieces.rows(len(input_tensor), trained=False)[0]
        stream = _WEIGHTS - rank
        key = random_key(collective.seed, stream, own.rounding, input_tensor.device)
        # what is gathered lies around what is sent: it is read first
        message = quantizer.encode(input_tensor.float(), segments, key)
        messages = message.new_empty(others + 1, len(message))
        sent(others * message.nbytes)
        all_gather_tensor(messages.view(-1), message, group=group)
        for row, received in zip(output_tensor.view(others + 1, -1), messages, strict=True):
            row.copy_(quantizer.decode(received, segments))
        return None


def has_hooks() -> bool:
    """Whether this torch's FSDP2 takes collectives (2.9 or newer)."""
    return hasattr(FSDPModule, "set_custom_reduce_scatter")


def _scale(op: Any, num_workers: int) -> float:
    """What a reduction gives, as a multiple of the mean."""
    if op == dist.ReduceOp.AVG:
        return 1.0
    if op == dist.ReduceOp.SUM:
        return num_workers
    if op == dist.ReduceOp.PREMUL_SUM:  # of set_gradient_divide_factor; its pickle has the factor
        return num_workers * float(op.__getstate__()[1])
    raise ValueError(f"compress_gradients does not know FSDP2's reduction {op}")


def _mesh(model: nn.Module, modules: Sequence[nn.Module]) -> DeviceMesh:
    """Over which all of a model is sharded.

    Raises:
        ValueError: A version of torch, or a way of sharding, that is not supported.
    """
    if not has_hooks():
        raise ValueError(
            f"compress_gradients on FSDP2 needs torch 2.9 or newer, found {torch.__version__}: "
            "update torch, leave it out, or train by DDP or DeepSpeed"
        )
    if any(module in _COMPRESSED for module in modules):
        raise ValueError(
            "the model's gradients are exchanged by compress_gradients already: call it once"
        )
    meshes = []
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            if parameter.requires_grad:
                raise ValueError(
                    f"compress_gradients: {name} is trained, but in no module that fully_shard "
                    "has got, so that nobody exchanges its gradients: shard the whole model, too"
                )
            continue
        mesh, first = parameter.device_mesh, parameter.placements[0]
        if mesh.ndim == 2 and isinstance(first, Replicate):
            raise ValueError(
                "compress_gradients cannot replace FSDP2's own all-reduce between replicas: give "
                "fully_shard the mesh of the shards alone, mesh['shard'], and compress_gradients "
                "group=mesh['replicate'].get_group()"
            )
        if mesh.ndim > 1 or not isinstance(first, Shard):
            raise ValueError(
                f"compress_gradients does not support FSDP2 with tensor parallelism: {name} lies "
                f"on {mesh.ndim} dimensions as {parameter.placements}"
            )
        meshes.append(mesh)
    if len(set(meshes)) != 1:
        raise ValueError(
            f"compress_gradients supports FSDP2 on one mesh for all modules, got {len(set(meshes))}"
        )
    return meshes[0]


def _check_replicas(group: dist.ProcessGroup, replicas: dist.ProcessGroup | None) -> None:
    """Raise ValueError unless shards times replicas are all processes."""
    shards = dist.get_process_group_ranks(group)
    same = [dist.get_rank()] if replicas is None else dist.get_process_group_ranks(replicas)
    total = dist.get_world_size()
    if len(shards) == 1 or len(shards) * len(same) != total or len({*shards} & {*same}) != 1:
        raise ValueError(
            f"the model is sharded over {len(shards)} of {total} processes, and group has the "
            f"ranks {same}: it must be of those that hold the same shards as this one, or left out "
            "where all hold others"
        )
