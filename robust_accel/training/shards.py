"""FSDP2 in a training run: weights, gradients, optimizer and average cut over the processes.

Accelerate has FSDP2 on GPUs alone, and only for models whose own forward is called; a robust model
holds the network that is attacked. So the network is cut here, by torch's ``fully_shard``, as the
launch configuration says (``launcher.py``), on GPUs and CPUs alike. For Accelerate the run is then
one of plain processes, whose model it does not prepare.
"""

import copy
import functools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from robust_accel.messages import close_to, one_line
from robust_accel.models import PixelClassifier
from robust_accel.optim.sharded import whole
from robust_accel.recipe import Recipe
from robust_accel.robust_model import RobustModel
from robust_accel.training.accelerator import broadcast_all
from robust_accel.training.launcher import Sharding
from robust_accel.training.shard_files import ShardReader, read_shards, write_shards

logger = logging.getLogger(__name__)

# their steps are each element's own, or, LAMB's, know of pieces
OPTIMIZERS = ("lamb", "sgd", "nesterov", "momentum", "adam", "adamw")


class Shards:
    """One run's model in pieces.

    Args:
        classifier: The network that is to be trained, whole, on its device; cut in place.
        average: Another with averaged weights, if there is one; cut as well.
        precision: Accelerate's ``mixed_precision``.
        keep_gathered: Gather the weights once a micro-batch, for all of an attack and the outer
            loss, not in each forward and backward.

    Raises:
        ValueError: The network cannot be cut as the launch configuration, or trained as the recipe
            says.

    Attributes:
        copies: So many the processes hold, each by as many processes (HSDP).
        replicas: The processes that hold the same pieces as this one, where there are such.
    """

    def __init__(
        self,
        sharding: Sharding,
        classifier: PixelClassifier,
        average: nn.Module | None,
        accelerator: Accelerator,
        precision: str,
        keep_gathered: bool,
    ) -> None:
        self._accelerator, self._keep_gathered = accelerator, keep_gathered
        self._outline = _outline(classifier)
        self._modules: dict[str, nn.Module] = {"model": classifier}
        if average is not None:
            self._modules["average"] = average
        if sharding.activation_checkpointing:
            _checkpoint_activations(classifier.model)
        self.copies = sharding.replicas
        mesh, self.replicas = _mesh(accelerator, self.copies)
        for module in self._modules.values():
            module.to(memory_format=torch.contiguous_format)  # whole ones are as they were
            _cut(module.get_submodule("model"), sharding, precision, mesh)
        self._parts: list[Any] = [m for m in classifier.modules() if isinstance(m, FSDPModule)]
        _tell(sharding, len(self._parts))
        own = sharding.reshard_after_forward
        self._resharded = [own and part is not classifier.model for part in self._parts]
        self._optimizer: Optimizer | None = None

    def _reshard(self) -> None:
        """Drop what a forward has left gathered: it is not what is trained."""
        for part in self._parts:
            part.reshard()

    def prepare(self, robust_model: RobustModel, optimizer: Optimizer) -> tuple[RobustModel, Any]:
        """In place of ``accelerator.prepare``: gradients are exchanged once a step."""
        self._optimizer = optimizer
        robust_model.register_forward_pre_hook(self._before)
        robust_model.register_forward_hook(self._after)
        return robust_model, AcceleratedOptimizer(optimizer)

    def _before(self, module: nn.Module, _: object) -> None:
        self._parts[0].set_requires_gradient_sync(self._accelerator.sync_gradients)
        if self._keep_gathered and module.training:
            for part in self._parts:
                part.set_reshard_after_forward(False, recurse=False)
                part.set_reshard_after_backward(False, recurse=False)

    def _after(self, module: nn.Module, _: object, found: dict[str, Tensor]) -> None:
        """The backward that follows is the outer loss's, through all of its forwards."""
        for part, resharded in zip(self._parts, self._resharded, strict=True):
            part.set_reshard_after_forward(resharded, recurse=False)
        if self._keep_gathered and module.training:
            found["loss"].register_hook(self._leave_pieces)

    def _leave_pieces(self, _: Tensor) -> None:
        """At the end of the backward that begins, after what FSDP2 does there."""

        def leave() -> None:
            self._reshard()
            for part in self._parts:
                part.set_reshard_after_backward(True, recurse=False)

        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(leave))  # FSDP2 queues its own later than this

    def whole(self, *, raw: bool = False) -> PixelClassifier:
        """A copy that is not cut, of the averaged weights where there are any.

        Every process must call it, and has one then: what is measured is measured on plain
        weights, of which each process has its own images.

        Args:
            raw: Of those that are trained in any case.
        """
        self._reshard()
        twin = copy.deepcopy(self._outline).to_empty(device=self._accelerator.device)
        source = list(self._modules.values())[0 if raw else -1]
        pairs = zip(_tensors(twin), _tensors(source), strict=True)
        with torch.no_grad():
            for tensor, own in pairs:
                tensor.copy_(whole(own))
        return twin

    def save(self, folder: Path) -> None:
        """Write weights, averaged ones and the optimizer. Every process must call it."""
        assert self._optimizer is not None
        # each process has its own statistics, and any of them may write them
        broadcast_all([b for module in self._modules.values() for b in module.buffers()])
        state = self._optimizer.state_dict()
        kept = {
            f"{index}.{key}": value
            for index, values in state["state"].items()
            for key, value in values.items()
        }
        others = {name: value for name, value in kept.items() if not isinstance(value, Tensor)}
        tensors = {f"optimizer.{n}": v for n, v in kept.items() if isinstance(v, Tensor)}
        write_shards(self._weights() | tensors, folder / "shards")
        if self._accelerator.is_main_process:
            groups = {"param_groups": state["param_groups"], "values": others}
            torch.save(groups, folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """Read them, which as many processes as ever have written. Every process must call it.

        Raises:
            ValueError: They are not this model's.
        """
        assert self._optimizer is not None
        plain = _read_plain(folder / "optimizer.pt")
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {index: {} for index in range(len(parameters))}
        reader, tensors = ShardReader(folder / "shards"), self._weights()
        for name, (size, dtype) in reader.kinds().items():
            if not name.startswith("optimizer."):
                continue
            index, key = _place(name.removeprefix("optimizer."), len(parameters), folder)
            like = parameters[index]
            if size == like.shape:
                empty = torch.empty_like(like, dtype=dtype)
            elif size.numel() == 1:
                empty = torch.empty(size, dtype=dtype)
            else:
                raise ValueError(f"{folder}: {name} is of shape {tuple(size)}: no optimizer's")
            tensors[name] = state[index][key] = empty
        with torch.no_grad():
            read_shards(tensors, reader)
        for name, value in plain["values"].items():
            index, key = _place(name, len(parameters), folder / "optimizer.pt")
            state[index][key] = value
        filled = {index: kept for index, kept in state.items() if kept}
        self._optimizer.load_state_dict({"state": filled, "param_groups": plain["param_groups"]})

    def _weights(self) -> dict[str, Tensor]:
        self._reshard()
        return {
            f"{name}.{key}": tensor.detach()
            for name, module in self._modules.items()
            for key, tensor in module.state_dict().items()
        }


def _read_plain(path: Path) -> dict[str, Any]:
    """What is no tensor of an optimizer's state.

    Raises:
        ValueError: The file has something else.
    """
    plain = torch.load(path, map_location="cpu", weights_only=True)
    parts = {"values": dict, "param_groups": list}
    for name, kind in parts.items():
        if not (isinstance(plain, dict) and isinstance(plain.get(name), kind)):
            raise ValueError(f"{path}: {name}: missing, or no {kind.__name__}")
    return plain


def _place(name: object, count: int, where: Path) -> tuple[int, str]:
    """Of which parameter something is, by its number, and its name there.

    Raises:
        ValueError: There are ``count``, and it is of none.
    """
    index, _, key = str(name).partition(".")
    if not (index.isdecimal() and int(index) < count):
        raise ValueError(f"{where}: {one_line(str(name), 100)} is of no parameter of this model")
    return int(index), key


def check_recipe(recipe: Recipe, sharding: Sharding | None, precision: str) -> None:
    """Refuse what cannot be done in pieces, or only in pieces.

    Args:
        precision: Accelerate's ``mixed_precision``.

    Raises:
        RecipeError: ``file: section.key: what was found, what is allowed``.
    """
    for section, found, said in _conflicts(recipe, sharding, precision):
        if found:

            def refuse(said: str = said) -> NoReturn:
                raise ValueError(said)

            recipe.checked(section, refuse)


def check_network(network: nn.Module, sharding: Sharding, precision: str) -> None:
    """Refuse a network that is not cut as the launch configuration says.

    Raises:
        ValueError: The key, what was found and what is allowed.
    """
    norms = [name for name, m in network.named_modules() if isinstance(m, _BatchNorm)]
    if precision == "bf16" and norms:
        raise ValueError(
            f"train.precision: bf16 under FSDP2 is that of the weights, and {norms[0]} is a "
            "BatchNorm, which keeps fp32 statistics; allowed: fp32"
        )
    classes = {type(module).__name__ for module in network.modules()}
    if unknown := sorted(set(sharding.layers) - classes):
        raise ValueError(
            f"launch configuration: fsdp_transformer_layer_cls_to_wrap: {', '.join(unknown)} is no "
            f"module of {type(network).__name__}{close_to(unknown[0], sorted(classes), 3)}"
        )


def _conflicts(
    recipe: Recipe, sharding: Sharding | None, precision: str
) -> list[tuple[str, bool, str]]:
    """Sections, whether they have the conflict, and what is said of it."""
    train, optimizer = recipe.train, recipe.optimizer
    assert train is not None and optimizer is not None
    if sharding is None:
        alone = "under FSDP2 alone: launch with accelerate/fsdp2 (recipe copy), or leave it out"
        bits = getattr(recipe.communication, "weight_bits", None)
        return [
            ("train", train.keep_gathered, f"keep_gathered: weights are gathered {alone}"),
            ("communication", bits is not None, f"weight_bits: weights are gathered {alone}"),
        ]
    more = precision == "bf16" and getattr(recipe.communication, "weight_bits", None) == 16
    aligns = getattr(recipe.objective, "grad_align", None) is not None
    is_exact = optimizer.name in OPTIMIZERS
    return [
        ("train", train.awp is not None, "awp: not possible with FSDP2, whose weights are pieces"),
        ("train", train.compile, "compile: true is not possible with FSDP2"),
        ("train", precision == "fp16", "precision: fp16 is not possible with FSDP2: try bf16"),
        ("objective", aligns, "grad_align: not possible with FSDP2, it differentiates twice"),
        (
            "communication",
            more,
            "weight_bits: 16 sends more than the weights themselves, which are bf16: 8, or leave "
            "it out",
        ),
        (
            "optimizer",
            not is_exact,
            f"name: {optimizer.name} is not known to be exact on FSDP2's pieces; allowed: "
            f"{', '.join(OPTIMIZERS)}",
        ),
    ]


def _mesh(accelerator: Accelerator, replicas: int) -> tuple[DeviceMesh, ProcessGroup | None]:
    """The processes that hold one copy together: neighbours, which are on one machine."""
    kind, num_processes = accelerator.device.type, accelerator.num_processes
    if replicas == 1:
        return init_device_mesh(kind, (num_processes,)), None
    sizes, names = (replicas, num_processes // replicas), ("replicate", "shard")
    mesh = init_device_mesh(kind, sizes, mesh_dim_names=names)
    return mesh["shard"], mesh["replicate"].get_group()


def _cut(network: nn.Module, sharding: Sharding, precision: str, mesh: DeviceMesh) -> None:
    """Cut the layers, inner ones before those around them, then what is left."""
    check_network(network, sharding, precision)
    dtype = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32)
    shard: Any = functools.partial(fully_shard, mesh=mesh)
    layers = [m for m in network.modules() if type(m).__name__ in sharding.layers]
    try:
        for module in reversed(layers):
            if module is not network:
                own = sharding.reshard_after_forward
                shard(module, mp_policy=policy, reshard_after_forward=own)
        policy = replace(policy, output_dtype=dtype and torch.float32)
        shard(network, mp_policy=policy, reshard_after_forward=False)
    except NotImplementedError as error:
        raise ValueError(
            f"model: FSDP2 cannot cut {type(network).__name__} ({one_line(str(error), 300)}): "
            "train by DDP or DeepSpeed"
        ) from error


def _tell(sharding: Sharding, number: int) -> None:
    """How many parts are gathered each by itself."""
    if number > 1:
        logger.info("FSDP2: %d units, of %s and the rest", number, ", ".join(sharding.layers))
    else:
        logger.info(
            "FSDP2: 1 unit, no layer by itself: it stays gathered from its forward to its "
            "backward, whatever fsdp_reshard_after_forward says"
        )


def _checkpoint_activations(network: Any) -> None:
    """By timm's own switch."""
    if any(isinstance(module, _BatchNorm) for module in network.modules()):
        raise ValueError(
            "launch configuration: fsdp_activation_checkpointing: BatchNorm would see each batch "
            "twice; allowed: false"
        )
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise ValueError(
            "launch configuration: fsdp_activation_checkpointing: "
            f"{type(network).__name__} has none; allowed: false"
        ) from None


def _outline(module: PixelClassifier) -> PixelClassifier:
    """A copy whose tensors have shapes and nothing else."""
    memo: dict[int, Any] = {}
    for tensor in _tensors(module):
        empty = torch.empty_like(tensor, device="meta")
        is_trained = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_trained else empty
    return copy.deepcopy(module, memo)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
