"""The two passes of a LAMB step over tensors that are updated alike, in three forms.

``plain`` is the reference, tensor by tensor; ``foreach`` runs one kernel over many tensors (GPU);
``fused`` (CPU) has torch's own fused kernel of Adam compute the direction in one pass, for so few
tensors at a time that the directions are still in the cache when they are used.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from robust_accel.optim.sharded import Over

Form = Literal["plain", "foreach", "fused"]

FUSED_BATCH = 1 << 20  # elements of several tensors: their directions are 4 MiB


class Row(NamedTuple):
    """One tensor that is updated as a layer, or one piece of it on this rank."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    layer: int
    ndim: int  # of the whole tensor

    def fusable(self) -> bool:
        """Whether the four tensors are plain fp32 on a CPU and lie in memory in one dense order."""
        four = self[:4]
        param = self.param
        return (
            param.device.type == "cpu"
            and all(type(t) in (Tensor, nn.Parameter) for t in four)
            and all(t.dtype == torch.float32 and t.device == param.device for t in four)
            and all(t.stride() == param.stride() for t in four)
            and (
                param.is_contiguous()
                or (param.ndim == 4 and param.is_contiguous(memory_format=torch.channels_last))
            )
        )


@dataclass
class Batch:
    """Tensors of one group, device and dtype that are updated alike."""

    group: dict[str, Any]
    form: Form
    adapt: bool  # a layer-wise factor and weight decay, or a plain step of Adam
    over: Over | None = None  # who holds the layers' other pieces
    rows: list[Row] = field(default_factory=list)
    num_elements: int = 0
    workspace: Tensor | None = None  # fp32, for u: batches that take turns share one
    updates: list[Tensor] = field(default_factory=list)
    weight_norms: Tensor = field(default_factory=lambda: torch.empty(0))  # [num_tensors]
    update_norms: Tensor = field(default_factory=lambda: torch.empty(0))  # [num_tensors]

    def append(self, row: Row) -> None:
        self.rows.append(row)
        self.num_elements += row.param.numel()

    def has_room(self, row: Row) -> bool:
        return self.form != "fused" or self.num_elements + row.param.numel() <= FUSED_BATCH

    @property
    def params(self) -> list[Tensor]:
        return [row.param for row in self.rows]

    @property
    def layers(self) -> list[int]:
        """The index of each tensor's layer in its group."""
        return [row.layer for row in self.rows]

    @property
    def weight_decay(self) -> float:
        return self.group["weight_decay"] if self.adapt else 0.0

    def corrections(self) -> tuple[list[Any], list[Any]]:
        """1 - beta^t of m and v for each tensor, this step counted."""
        beta1, beta2 = self.group["betas"]
        counts = _counts([row.step for row in self.rows])
        return [1 - beta1**t for t in counts], [1 - beta2**t for t in counts]


def update_and_norms(batch: Batch) -> None:
    """First pass: advance m and v, and compute u and both norms."""
    _DIRECTIONS[batch.form](batch)
    if batch.adapt:
        batch.weight_norms = torch.stack(_l2_norms(batch.params))
        batch.update_norms = torch.stack(_l2_norms(batch.updates))


def descend(batch: Batch) -> None:
    """Second pass: theta = theta - rate u; overwrites u."""
    rates = _rates(batch)
    if batch.form == "foreach":
        torch._foreach_mul_(batch.updates, rates)
        torch._foreach_sub_(batch.params, batch.updates)
        return
    for param, update, rate in zip(batch.params, batch.updates, rates, strict=True):
        if batch.form == "fused":
            param.sub_(update, alpha=rate)
        else:
            param.sub_(update.mul_(rate))


def _counts(steps: list[Tensor]) -> list[Any]:
    # step counts live on the CPU: reading them waits for no GPU. A compiled graph keeps the
    # tensors, which numbers would tie to their values; in fp32, 1 - 0.999 would lose four digits.
    if torch.compiler.is_compiling():
        return [step.double() for step in steps]
    return torch.stack(steps).tolist()


def _direction_plain(batch: Batch) -> None:
    """Algorithm A2 tensor by tensor: the reference. Advances m and v, computes u."""
    beta1, beta2 = batch.group["betas"]
    corrections1, corrections2 = batch.corrections()
    for i, (param, grad, exp_avg, exp_avg_sq, *_) in enumerate(batch.rows):
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq / corrections2[i]).sqrt_().add_(batch.group["eps"])
        update = (exp_avg / corrections1[i]).div_(denominator)
        if batch.weight_decay != 0:
            update.add_(param, alpha=batch.weight_decay)
        batch.updates.append(update)


def _direction_foreach(batch: Batch) -> None:
    """The same with one kernel for many tensors."""
    beta1, beta2 = batch.group["betas"]
    corrections1, corrections2 = batch.corrections()
    params, grads, exp_avgs, exp_avg_sqs, *_ = map(list, zip(*batch.rows, strict=True))
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    denominators = torch._foreach_div(exp_avg_sqs, corrections2)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, batch.group["eps"])
    updates = torch._foreach_div(exp_avgs, corrections1)
    torch._foreach_div_(updates, denominators)
    if batch.weight_decay != 0:
        torch._foreach_add_(updates, params, alpha=batch.weight_decay)
    batch.updates = list(updates)


def _direction_fused(batch: Batch) -> None:
    """The same by Adam's kernel: a step of rate -1 from zero ends at its direction."""
    beta1, beta2 = batch.group["betas"]
    memory = batch.workspace  # fresh memory costs more than all the arithmetic here
    if memory is None:
        memory = torch.empty(batch.num_elements, dtype=torch.float32, device="cpu")
    params, grads, exp_avgs, exp_avg_sqs, steps, *_ = map(list, zip(*batch.rows, strict=True))
    flat = memory[: batch.num_elements].zero_().split([param.numel() for param in params])
    updates = [u.as_strided(p.shape, p.stride()) for u, p in zip(flat, params, strict=True)]
    torch._fused_adam_(
        updates,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        lr=-1.0,
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=batch.group["eps"],
        amsgrad=False,
        maximize=False,
    )
    if batch.weight_decay != 0:
        torch._foreach_add_(updates, params, alpha=batch.weight_decay)
    batch.updates = updates


_DIRECTIONS = {
    "plain": _direction_plain,
    "foreach": _direction_foreach,
    "fused": _direction_fused,
}


def _rates(batch: Batch) -> list[Any]:
    """lr tau(||theta||) / ||u|| for each tensor, equation (3); or lr, as Adam. Fused: numbers."""
    lr = batch.group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.reshape(())  # of one element: a parameter may have no dimension
    if not batch.adapt:
        return [float(lr) if batch.form == "fused" else lr] * len(batch.rows)
    c_l, c_u = batch.group["weight_norm_clamp"]
    tau = batch.weight_norms.clamp(c_l, c_u)
    # 1 where either is zero: see the class; a NaN equals nothing, and passes
    ratio = torch.where((tau == 0) | (batch.update_norms == 0), 1.0, tau / batch.update_norms)
    rates = ratio * lr
    # on a CPU a number is at hand, and spares a pass; elsewhere reading it would wait for the GPU
    return rates.tolist() if batch.form == "fused" else list(rates.unbind())


def _l2_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Norms in fp32 or better: an fp16 sum of squares overflows at a norm of 256."""
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors):
        # _foreach_norm has a dtype too, but DTensor fails on it in torch 2.14
        dtypes = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]
        pairs = zip(tensors, dtypes, strict=True)
        return [torch.linalg.vector_norm(tensor, dtype=dtype) for tensor, dtype in pairs]
    return list(torch._foreach_norm(tensors, 2)) if tensors else []
