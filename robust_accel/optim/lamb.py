"""LAMB, the layer-wise adaptive optimizer of distributed adversarial training (equation (3))."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from robust_accel.optim.lamb_kernels import Batch, Form, Row, descend, update_and_norms
from robust_accel.optim.sharded import Over, local, over

_FSDP1 = ("_is_flat_param", "_fsdp_flattened")  # its marks on parameters
_NO_FSDP1 = (
    "LAMB does not support FSDP1, whose parameters are pieces of layers laid end to end: use FSDP2 "
    "(fully_shard; Accelerate: fsdp_version: 2)"
)


class Piece(NamedTuple):
    """The part of one layer's tensor that lies in a flat shard; see ``LAMB.shard``."""

    layer: int  # index of the tensor among its group's, the same on every rank
    start: int  # of the part's first element in the shard
    size: int  # number of elements
    ndim: int  # of the whole tensor, for exclude_1d


class _Shard(NamedTuple):
    pieces: tuple[Piece, ...]
    num_layers: int
    sum_over_ranks: Callable[[Tensor], Tensor]


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

    Of a DTensor (FSDP2, tensor parallelism) each process updates its own piece by the norms of the
    whole tensor: one small all-reduce a step for all of them.

    Norms of fp16 and bf16 tensors are computed in fp32. NaN gradients give NaN parameters, and an
    infinite entry turns its whole tensor into NaN (through the norm), so neither can go unnoticed.
    A step holds one temporary copy of the parameters: the updates. Fused and not sharded, it holds
    those of a million elements, or of one tensor, at a time.

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
        fused: Let torch's fused kernel of Adam compute the direction of fp32 tensors on a CPU;
            None: unless foreach is given.

    Raises:
        ValueError: An option is out of range, a parameter is complex or FSDP1's, or a gradient is
            sparse.

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
        fused: bool | None = None,
    ) -> None:
        self._shapes: set[torch.Size] = set()  # of every tensor that we were given
        self._shards: dict[Tensor, _Shard] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_norm_clamp": weight_norm_clamp,
            "exclude_1d": exclude_1d,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if any(getattr(param, mark, False) for mark in _FSDP1):
                raise ValueError(_NO_FSDP1)
            if param.is_complex():
                raise ValueError(f"params must be real, got a parameter of dtype {param.dtype}")
            self._shapes.add(param.shape)

    def shard(
        self,
        flat: Tensor,
        pieces: Sequence[Piece],
        num_layers: int,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        """Tell which layers lie in a flat shard that has replaced a group's parameters.

        DeepSpeed's ZeRO 1 and 2 replace each group's ``params`` by one tensor: this rank's part of
        the group laid end to end. A step then takes each piece as a tensor of its own, whose norms
        are those of the whole layer: its squared norms are summed over ranks. Elements outside of
        all pieces (padding) are never touched. The state stays one tensor a shard.

        Every rank calls this for each group, also a rank that holds nothing but padding.

        Args:
            flat: [num_elements], the only parameter of one group.
            pieces: Those on this rank, in any order; they may not overlap.
            num_layers: Tensors in the whole group, the same on every rank.
            sum_over_ranks: Gets one [2, num_layers] fp32 tensor on flat's device, returns its sum
                over ranks. Called once a step of the group on every rank, gradient or not.

        Raises:
            ValueError: flat is no group's only parameter, or the pieces do not fit in it.
        """
        if not any(len(g["params"]) == 1 and g["params"][0] is flat for g in self.param_groups):
            raise ValueError("flat must be the only parameter of one of the optimizer's groups")
        if flat.ndim != 1:
            raise ValueError(f"flat must have one dimension, got shape {tuple(flat.shape)}")
        end = 0
        for piece in sorted(pieces, key=lambda piece: piece.start):
            if not (0 <= piece.layer < num_layers and end <= piece.start and piece.size >= 0):
                raise ValueError(f"{piece} overlaps another, or is no layer of {num_layers}")
            end = piece.start + piece.size
        if end > flat.numel():
            raise ValueError(f"pieces end at element {end} of a shard of {flat.numel()}")
        self._shards[flat] = _Shard(tuple(pieces), num_layers, sum_over_ranks)

    def __getstate__(self) -> dict[str, Any]:
        # a copy of a sharded optimizer has no shards, and its step must refuse
        return {**super().__getstate__(), "_shapes": self._shapes, "_shards": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("fused", None)  # saved before the option was there
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

        num_layers, cut = 0, defaultdict[Over, list[Batch]](list)  # DTensors, of all groups
        for group in self.param_groups:
            shard = self._shards.get(group["params"][0]) if self._shards else None
            batches = self._collect(group, shard, num_layers)
            if shard is not None:
                self._descend_together(
                    batches, shard.num_layers, shard.sum_over_ranks, group["params"][0].device
                )
                continue
            num_layers += sum(len(batch.rows) for batch in batches)
            workspace = _workspace(batches)
            for batch in batches:
                if batch.over is not None:
                    cut[batch.over].append(batch)
                    continue
                batch.workspace = workspace  # both at once, while its updates are in the cache
                update_and_norms(batch)
                descend(batch)
        for over_ranks, batches in cut.items():
            device = batches[0].params[0].device
            self._descend_together(batches, num_layers, over_ranks.sum, device)
        return loss

    @staticmethod
    def _descend_together(
        batches: Sequence[Batch],
        num_layers: int,
        sum_over_ranks: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """A step of pieces of layers, by one sum over ranks of all squared norms."""
        for batch in batches:
            update_and_norms(batch)
        _sum_norms(batches, num_layers, sum_over_ranks, device)
        for batch in batches:
            descend(batch)

    def _collect(
        self, group: dict[str, Any], shard: _Shard | None, first_layer: int
    ) -> list[Batch]:
        """The group's layers with a gradient, in batches of one device, dtype and treatment."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        exp_avgs: list[Tensor] = []
        exp_avg_sqs: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, steps)
        if steps:
            torch._foreach_add_(steps, 1)
        overs = [over(param) for param in params]
        four = (params, grads, exp_avgs, exp_avg_sqs)
        params, grads, exp_avgs, exp_avg_sqs = (
            [local(t, param) for t, param in zip(same, params, strict=True)] for same in four
        )
        rows = [
            Row(*row, layer, row[0].ndim)
            for layer, row in enumerate(
                zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True), first_layer
            )
        ]
        if shard is not None and rows:
            rows = _cut(rows[0], shard.pieces)
            overs = [None] * len(rows)
        fused = _may_fuse(group)
        foreach = group["foreach"]
        if foreach is None:
            foreach = all(param.is_cuda for param in params)
        batches: list[Batch] = []
        last: dict[tuple[torch.device, torch.dtype, bool, Form, Over | None], Batch] = {}
        for row, over_ranks in zip(rows, overs, strict=True):
            adapt = not group["exclude_1d"] or row.ndim > 1
            form: Form = "foreach" if foreach else "plain"
            if fused and row.fusable():
                form = "fused"
            key = (row.param.device, row.param.dtype, adapt, form, over_ranks)
            if key not in last or not last[key].has_room(row):
                last[key] = Batch(group, form, adapt, over_ranks)
                batches.append(last[key])
            last[key].append(row)
        return batches

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
            if any(getattr(param, mark, False) for mark in _FSDP1):
                raise ValueError(_NO_FSDP1)
            if param.ndim == 1 and param.shape not in self._shapes and param not in self._shards:
                raise RuntimeError(
                    "LAMB's parameters were replaced by a flat shard (DeepSpeed ZeRO), whose norm"
                    " is no layer's: under ZeRO 1 and 2 call robust_accel.compress_gradients(model,"
                    " ...) after accelerator.prepare(), which tells LAMB the layers; in place of"
                    " ZeRO 3, which cuts weights as well, use FSDP2"
                )
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            params.append(param)
            grads.append(param.grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            steps.append(state["step"])


def _cut(whole: Row, pieces: Sequence[Piece]) -> list[Row]:
    """Each piece of a flat shard as a tensor of its own: views."""
    rows = []
    for p in pieces:
        param, grad, exp_avg, exp_avg_sq = (t[p.start : p.start + p.size] for t in whole[:4])
        rows.append(Row(param, grad, exp_avg, exp_avg_sq, whole.step, p.layer, p.ndim))
    return rows


def _may_fuse(group: dict[str, Any]) -> bool:
    if torch.compiler.is_compiling():  # a user's torch.compile(optimizer.step) fuses by itself
        return False
    return group["foreach"] is None if group["fused"] is None else group["fused"]


def _workspace(batches: Sequence[Batch]) -> Tensor:
    """Memory for the updates of any one fused batch."""
    sizes = [batch.num_elements for batch in batches if batch.form == "fused"]
    return torch.empty(max(sizes, default=0), dtype=torch.float32, device="cpu")


def _sum_norms(
    batches: Sequence[Batch],
    num_layers: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    device: torch.device,
) -> None:
    """Replace the norms of this rank's pieces by the norms of the whole layers."""
    # each layer has its place: ranks may batch theirs otherwise, or hold nothing of some
    squares = torch.zeros(2, num_layers, dtype=torch.float32, device=device)
    adapted = [batch for batch in batches if batch.adapt]
    for batch in adapted:
        index = torch.tensor(batch.layers, device=device)
        norms = torch.stack([batch.weight_norms, batch.update_norms])
        squares.index_add_(1, index, norms.square().to(torch.float32))
    norms = sum_over_ranks(squares).sqrt()
    for batch in adapted:
        batch.weight_norms, batch.update_norms = norms[:, batch.layers].unbind()


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
