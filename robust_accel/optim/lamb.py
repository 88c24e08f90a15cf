"""LAMB, the layer-wise adaptive optimizer of distributed adversarial training (equation (3))."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LAMB(Optimizer):
    """Adam whose step on each tensor is as long as the tensor's clamped norm times ``lr``.

    For each tensor theta ("layer") with gradient g::

        m = beta1 m + (1 - beta1) g              m_hat = m / (1 - beta1^t)
        v = beta2 v + (1 - beta2) g^2            v_hat = v / (1 - beta2^t)
        u = m_hat / (sqrt(v_hat) + eps) + weight_decay theta
        theta = theta - lr tau(||theta||) / ||u|| u,     tau(z) = min(max(z, c_l), c_u)

    A tensor with tau(||theta||) = 0 (zero-initialised, c_l = 0) would stay at zero for ever, and
    ||u|| = 0 would divide by zero. In both cases tau(||theta||) / ||u|| is taken to be 1, as You
    et al.'s code and timm do: a zero-initialised tensor starts with a step of Adam.

    Norms of fp16 and bf16 tensors are computed in fp32. NaN gradients give NaN parameters, and an
    infinite entry turns its whole tensor into NaN (through the norm), so neither can go unnoticed.
    A step holds one temporary copy of the parameters: the updates.

    Args:
        params: Parameters, named parameters or groups; a group may override every option below.
        lr: Learning rate eta >= 0; a float, or a one-element tensor, which spares a compiled step
            (``torch.compile(optimizer.step)``) a compilation for each new value.
        betas: Decay rates of m and v, both in [0, 1).
        eps: > 0, the algorithm's zeta.
        weight_decay: >= 0, added to u before its norm is taken (You et al.; (A30) has none).
        weight_norm_clamp: (c_l, c_u), 0 <= c_l <= c_u and c_u > 0; the paper's are (0, 10), and
            (0, inf) is plain LAMB.
        exclude_1d: Give tensors of at most one dimension (BatchNorm, biases) a plain step of Adam:
            no layer-wise factor and no weight decay. The paper's own code adapts them too.
        foreach: Run over all tensors of a group at once; None: when they are all on a GPU.

    Raises:
        ValueError: An option is out of range, a parameter is complex, or a gradient is sparse.

    Source: Algorithm A2 and equation (3) of Zhang et al., "Distributed Adversarial Training to
    Robustify Deep Neural Networks at Scale"; You et al. 2019 (arXiv 1904.00962). Both bias
    corrections are there, as in Algorithm A2; the paper's code leaves them out.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        weight_norm_clamp: Sequence[float] = (0.0, 10.0),
        *,
        exclude_1d: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_norm_clamp": weight_norm_clamp,
            "exclude_1d": exclude_1d,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.is_complex():
                raise ValueError(f"params must be real, got a parameter of dtype {param.dtype}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # a checkpoint may have been read onto a GPU: step counts there would cost a wait each
        for values in self.state.values():
            if "step" in values:
                values["step"] = torch.as_tensor(values["step"], dtype=torch.float32, device="cpu")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        batches: list[_Batch] = []
        for group in self.param_groups:
            batches += self._collect(group)
        for batch in batches:
            direction = _direction_foreach if batch.foreach else _direction_plain
            batch.updates = direction(batch)

        adapted = [batch for batch in batches if batch.adapt]
        weight_norms, update_norms = self._norms(
            [param for batch in adapted for param in batch.params],
            [update for batch in adapted for update in batch.updates],
        )
        start = 0
        for batch in batches:
            scales: Sequence[Any] = [batch.group["lr"]] * len(batch.params)
            if batch.adapt:
                part = slice(start, start + len(batch.params))
                start = part.stop
                scales = _layer_rates(batch.group, weight_norms[part], update_norms[part])
            _descend(batch, scales)
        return loss

    def _norms(
        self, params: list[Tensor], updates: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """||theta|| and ||u|| of every adapted tensor, in order; called once a step.

        Where a rank holds shards of the tensors, override this: sum the squared norms over ranks.
        """
        return _l2_norms(params), _l2_norms(updates)

    def _adapts(self, param: Tensor, group: dict[str, Any]) -> bool:
        """Whether a tensor has a layer-wise factor and weight decay."""
        return not group["exclude_1d"] or param.ndim > 1

    def _collect(self, group: dict[str, Any]) -> list["_Batch"]:
        """The group's tensors with a gradient, in batches of one device, dtype and treatment."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, steps)
        foreach = group["foreach"]
        if foreach is None:
            foreach = all(param.is_cuda for param in params)
        batches: dict[tuple[torch.device, torch.dtype, bool], _Batch] = {}
        for i, param in enumerate(params):
            key = (param.device, param.dtype, self._adapts(param, group))
            if key not in batches:
                batches[key] = _Batch(group, foreach, key[2], [], [], [], [], [], [])
            batch = batches[key]
            batch.params.append(param)
            batch.grads.append(grads[i])
            batch.exp_avgs.append(exp_avgs[i])
            batch.exp_avg_sqs.append(exp_avg_sqs[i])
            batch.steps.append(steps[i])
        return list(batches.values())

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        """Fill the lists with the group's tensors; a tensor's state is made at its first gradient.

        torch.compile knows this name and this form, and runs it outside of the compiled graph.
        """
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise ValueError("LAMB needs dense gradients, got a sparse one (sparse=True?)")
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            params.append(param)
            grads.append(param.grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            steps.append(state["step"])


@dataclass
class _Batch:
    """Tensors of one group, device and dtype that are updated alike."""

    group: dict[str, Any]
    foreach: bool
    adapt: bool
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    updates: list[Tensor]

    @property
    def weight_decay(self) -> float:
        return self.group["weight_decay"] if self.adapt else 0.0

    def corrections(self) -> tuple[list[Any], list[Any]]:
        """1 - beta^t of m and v for each tensor; advances t."""
        for step in self.steps:
            step += 1
        beta1, beta2 = self.group["betas"]
        counts = [_count(step) for step in self.steps]
        return [1 - beta1**t for t in counts], [1 - beta2**t for t in counts]


def _count(step: Tensor) -> Any:
    # step counts live on the CPU: reading one waits for no GPU. A compiled graph keeps the
    # tensor, which a number would tie to its value; in fp32, 1 - 0.999 would lose four digits.
    return step.double() if torch.compiler.is_compiling() else step.item()


def _direction_plain(batch: _Batch) -> list[Tensor]:
    """Algorithm A2 tensor by tensor: the reference. Advances m and v, returns u."""
    beta1, beta2 = batch.group["betas"]
    corrections1, corrections2 = batch.corrections()
    updates = []
    for i, param in enumerate(batch.params):
        grad, exp_avg, exp_avg_sq = batch.grads[i], batch.exp_avgs[i], batch.exp_avg_sqs[i]
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq / corrections2[i]).sqrt_().add_(batch.group["eps"])
        update = (exp_avg / corrections1[i]).div_(denominator)
        if batch.weight_decay != 0:
            update.add_(param, alpha=batch.weight_decay)
        updates.append(update)
    return updates


def _direction_foreach(batch: _Batch) -> list[Tensor]:
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
    return list(updates)


def _layer_rates(
    group: dict[str, Any], weight_norms: list[Tensor], update_norms: list[Tensor]
) -> list[Tensor]:
    """lr tau(||theta||) / ||u|| for each tensor of a batch, equation (3)."""
    c_l, c_u = group["weight_norm_clamp"]
    tau = torch.stack(weight_norms).clamp(c_l, c_u)
    update_norm = torch.stack(update_norms)
    # 1 where either is zero: see the class; a NaN equals nothing, and passes
    ratio = torch.where((tau == 0) | (update_norm == 0), 1.0, tau / update_norm)
    return list((ratio * group["lr"]).unbind())


def _descend(batch: _Batch, scales: Sequence[Any]) -> None:
    """theta = theta - scale u; overwrites u."""
    if batch.foreach:
        torch._foreach_mul_(batch.updates, scales)
        torch._foreach_sub_(batch.params, batch.updates)
        return
    for param, update, scale in zip(batch.params, batch.updates, scales, strict=True):
        param.sub_(update.mul_(scale))


def _l2_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Norms in fp32 or better: an fp16 sum of squares overflows at a norm of 256."""
    if any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors):
        # _foreach_norm has a dtype too, but DTensor (FSDP2) fails on it in torch 2.14
        dtypes = [torch.promote_types(tensor.dtype, torch.float32) for tensor in tensors]
        pairs = zip(tensors, dtypes, strict=True)
        return [torch.linalg.vector_norm(tensor, dtype=dtype) for tensor, dtype in pairs]
    return list(torch._foreach_norm(tensors, 2)) if tensors else []


def _check_options(options: dict[str, Any]) -> None:
    """Raise ValueError if an option of a group is out of its range."""
    lr, betas, clamp = options["lr"], options["betas"], options["weight_norm_clamp"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a one-element tensor, got shape {lr.shape}")
    if not 0 <= float(lr) < math.inf:
        raise ValueError(f"lr must be >= 0 and finite, got {lr}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    if not 0 < options["eps"] < math.inf:
        raise ValueError(f"eps must be > 0 and finite, got {options['eps']}")
    if not 0 <= options["weight_decay"] < math.inf:
        raise ValueError(f"weight_decay must be >= 0 and finite, got {options['weight_decay']}")
    if len(clamp) != 2 or not (0 <= clamp[0] <= clamp[1] and clamp[1] > 0):
        raise ValueError(
            f"weight_norm_clamp must be (c_l, c_u) with 0 <= c_l <= c_u and c_u > 0, got {clamp}"
        )
