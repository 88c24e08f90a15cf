"""The two passes of a LAMB step over tensors that are updated alike, in three forms.

``plain`` is the reference, tensor by tensor; ``foreach`` runs one kernel over many tensors (GPU);
``fused`` is two kernels a tensor made by torch.compile (CPU), which read and write each element
once a pass: a step of LAMB is bound by memory, and eager operators pass over it a dozen times.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

Form = Literal["plain", "foreach", "fused"]

FUSED_TENSOR = 1 << 14  # elements: calling a compiled kernel costs more than it saves below
FUSED_TOTAL = 1 << 20  # elements: a smaller model does not pay for seconds of compilation

_First = Callable[..., tuple[Tensor, Tensor]]
_Second = Callable[..., None]


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
            param.numel() >= FUSED_TENSOR
            and all(type(t) in (Tensor, nn.Parameter) for t in four)
            and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in four)
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
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)  # t of each tensor, this step counted
    layers: list[int] = field(default_factory=list)  # index of each tensor's layer in its group
    updates: list[Tensor] = field(default_factory=list)
    weight_norms: Tensor = field(default_factory=lambda: torch.empty(0))  # [num_tensors]
    update_norms: Tensor = field(default_factory=lambda: torch.empty(0))  # [num_tensors]

    def append(self, row: "Row") -> None:
        self.params.append(row.param)
        self.grads.append(row.grad)
        self.exp_avgs.append(row.exp_avg)
        self.exp_avg_sqs.append(row.exp_avg_sq)
        self.steps.append(row.step)
        self.layers.append(row.layer)

    @property
    def weight_decay(self) -> float:
        return self.group["weight_decay"] if self.adapt else 0.0

    def corrections(self) -> tuple[list[Any], list[Any]]:
        """1 - beta^t of m and v for each tensor."""
        beta1, beta2 = self.group["betas"]
        counts = [_count(step) for step in self.steps]
        return [1 - beta1**t for t in counts], [1 - beta2**t for t in counts]


def update_and_norms(batch: Batch) -> None:
    """First pass: advance m and v and compute u (fused: in the second), and both norms."""
    if batch.form == "fused":
        _first_fused(batch)
        return
    (_direction_foreach if batch.form == "foreach" else _direction_plain)(batch)
    if batch.adapt:
        batch.weight_norms = torch.stack(_l2_norms(batch.params))
        batch.update_norms = torch.stack(_l2_norms(batch.updates))


def descend(batch: Batch) -> None:
    """Second pass: theta = theta - rate u; overwrites u."""
    rates = _layer_rates(batch) if batch.adapt else [batch.group["lr"]] * len(batch.params)
    if batch.form == "fused":
        _second_fused(batch, rates)
    elif batch.form == "foreach":
        torch._foreach_mul_(batch.updates, rates)
        torch._foreach_sub_(batch.params, batch.updates)
    else:
        for param, update, rate in zip(batch.params, batch.updates, rates, strict=True):
            param.sub_(update.mul_(rate))


def _count(step: Tensor) -> Any:
    # step counts live on the CPU: reading one waits for no GPU. A compiled graph keeps the
    # tensor, which a number would tie to its value; in fp32, 1 - 0.999 would lose four digits.
    return step.double() if torch.compiler.is_compiling() else step.item()


def _direction_plain(batch: Batch) -> None:
    """Algorithm A2 tensor by tensor: the reference. Advances m and v, computes u."""
    beta1, beta2 = batch.group["betas"]
    corrections1, corrections2 = batch.corrections()
    for i, param in enumerate(batch.params):
        grad, exp_avg, exp_avg_sq = batch.grads[i], batch.exp_avgs[i], batch.exp_avg_sqs[i]
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
    torch._foreach_lerp_(batch.exp_avgs, batch.grads, 1 - beta1)
    torch._foreach_mul_(batch.exp_avg_sqs, beta2)
    torch._foreach_addcmul_(batch.exp_avg_sqs, batch.grads, batch.grads, value=1 - beta2)
    denominators = torch._foreach_div(batch.exp_avg_sqs, corrections2)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, batch.group["eps"])
    updates = torch._foreach_div(batch.exp_avgs, corrections1)
    torch._foreach_div_(updates, denominators)
    if batch.weight_decay != 0:
        torch._foreach_add_(updates, batch.params, alpha=batch.weight_decay)
    batch.updates = list(updates)


def _layer_rates(batch: Batch) -> list[Tensor]:
    """lr tau(||theta||) / ||u|| for each tensor, equation (3)."""
    c_l, c_u = batch.group["weight_norm_clamp"]
    tau = batch.weight_norms.clamp(c_l, c_u)
    # 1 where either is zero: see the class; a NaN equals nothing, and passes
    ratio = torch.where((tau == 0) | (batch.update_norms == 0), 1.0, tau / batch.update_norms)
    return list((ratio * batch.group["lr"]).unbind())


def _l2_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Norms in fp32 or better: an fp16 sum of squares overflows at a norm of 256."""
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors):
        # _foreach_norm has a dtype too, but DTensor (FSDP2) fails on it in torch 2.14
        dtypes = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]
        pairs = zip(tensors, dtypes, strict=True)
        return [torch.linalg.vector_norm(tensor, dtype=dtype) for tensor, dtype in pairs]
    return list(torch._foreach_norm(tensors, 2)) if tensors else []


# ------------------------------------------------------------------------------------- fused


def _moments(
    grad: Tensor, m: Tensor, v: Tensor, scalars: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The next m and v."""
    weight1, beta2, weight2 = scalars[:3]
    return m + weight1 * (grad - m), beta2 * v + weight2 * (grad * grad)


def _direction(param: Tensor, m: Tensor, v: Tensor, scalars: Sequence[Tensor]) -> Tensor:
    inverse1, inverse2, eps, weight_decay = scalars[3:]
    return (inverse1 * m) / ((inverse2 * v).sqrt() + eps) + weight_decay * param


def _first(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, scalars: Tensor) -> Any:
    """Sums of squares of theta and of u. All but scalars: [n] fp32.

    It writes nothing: the compiler would make a loop of its own for what is written.
    """
    numbers = scalars.unbind()
    new_m, new_v = _moments(grad, m, v, numbers)
    u = _direction(param, new_m, new_v, numbers)
    return (param * param).sum(), (u * u).sum()


def _second(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, scalars: Tensor, rate: Tensor
) -> None:
    """Advance m and v; theta = theta - rate u, computed again: cheaper than to store and load."""
    numbers = scalars.unbind()
    new_m, new_v = _moments(grad, m, v, numbers)
    param.copy_(param - rate * _direction(param, new_m, new_v, numbers))
    m.copy_(new_m)
    v.copy_(new_v)


@lru_cache(maxsize=None)  # noqa: UP033  tried once
def fused_kernels() -> tuple[_First, _Second] | None:
    """The two kernels, one compilation for tensors of every size; None, said once, if it fails."""
    try:
        first: _First = torch.compile(_first, dynamic=True)
        second: _Second = torch.compile(_second, dynamic=True)
        with torch.no_grad():
            # a size at which the compiler uses all threads
            one = torch.ones(FUSED_TOTAL)
            param, m, v, scalars = one.clone(), one.clone(), one.clone(), torch.ones(7)
            first(param, one, m, v, scalars)
            second(param, one, m, v, scalars, torch.tensor(1.0))
    except Exception as error:  # torch raises a different class for each missing tool
        logger.warning("torch.compile failed, LAMB runs tensor by tensor: %s", error)
        return None
    return first, second


def _flat(tensor: Tensor) -> Tensor:
    """The memory of a dense fp32 CPU tensor in its own order: [n]."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    # by way of numpy a view starts at offset 0: a graph is compiled again for another offset
    return torch.from_numpy(flat.numpy())


def _scalars(batch: Batch) -> list[Tensor]:
    """The kernels' numbers for each tensor, as tensors: a new number would compile again. [7]."""
    beta1, beta2 = batch.group["betas"]
    known: dict[float, Tensor] = {}
    for step in batch.steps:
        t = step.item()
        if t not in known:
            inverses = [1 / (1 - beta1**t), 1 / (1 - beta2**t)]
            numbers = [1 - beta1, beta2, 1 - beta2, *inverses, batch.group["eps"]]
            known[t] = torch.tensor([*numbers, batch.weight_decay], dtype=torch.float32)
    return [known[step.item()] for step in batch.steps]


def _columns(batch: Batch) -> list[list[Tensor]]:
    """What both kernels take, a list an argument."""
    tensors = [batch.params, batch.grads, batch.exp_avgs, batch.exp_avg_sqs]
    return [[_flat(t) for t in column] for column in tensors] + [_scalars(batch)]


def _first_fused(batch: Batch) -> None:
    kernels = fused_kernels()
    assert kernels is not None
    squares = [kernels[0](*row) for row in zip(*_columns(batch), strict=True)]
    norms = torch.stack([torch.stack(column) for column in zip(*squares, strict=True)]).sqrt()
    batch.weight_norms, batch.update_norms = norms.unbind()


def _second_fused(batch: Batch, rates: list[Any]) -> None:
    kernels = fused_kernels()
    assert kernels is not None
    for *row, rate in zip(*_columns(batch), rates, strict=True):
        # a copy of the rate, which is a view, for its offset too
        kernels[1](*row, torch.tensor(float(rate), dtype=torch.float32))
    torch.autograd.graph.increment_version(batch.params)  # written past autograd's eyes
