"""What the launch configuration asks for beside processes: done, or refused.

Accelerate's launcher tells it by the environment, and its ``Accelerator`` does most of it in
``prepare``, or takes it before what a program says. A recipe says how a network is trained: what
would be passed over, or would change that, is refused.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate.utils import FullyShardedDataParallelPlugin

from robust_accel.comm.deepspeed import passed_over
from robust_accel.comm.fsdp2 import has_hooks
from robust_accel.recipe import TrainSettings


class _Key(NamedTuple):
    """One of the environment's, which is allowed to be a few things."""

    said: str  # in the launch configuration
    allowed: tuple[str, ...]  # in capitals; the first one is what it is when it is not set
    why: str


_ALWAYS = {
    "ACCELERATE_DYNAMO_BACKEND": _Key("dynamo_backend", ("NO",), "train.compile compiles"),
    "ACCELERATE_USE_MEGATRON_LM": _Key("use_megatron_lm", ("FALSE",), "it is for language models"),
    "ACCELERATE_MIXED_PRECISION": _Key(
        "mixed_precision", ("NO", "BF16", "FP16"), "an attack's gradients need more"
    ),
}
_PARALLELISM = {
    f"PARALLELISM_CONFIG_{name}_SIZE": _Key(
        f"parallelism_config_{name.lower()}_size", ("1",), "each process has images of its own"
    )
    for name in ("TP", "CP", "SP")
}
_FSDP = {
    f"FSDP_{name}": _Key(f"fsdp_{name.lower()}", allowed, why)
    for name, allowed, why in (
        ("VERSION", ("2",), "FSDP1 joins a module's tensors to one, without the layers LAMB needs"),
        (
            "SHARDING_STRATEGY",
            ("FULL_SHARD", "1"),
            "FSDP2 asks for replicas by parallelism_config_dp_replicate_size",
        ),
        (
            "AUTO_WRAP_POLICY",
            ("NO_WRAP", "TRANSFORMER_BASED_WRAP"),
            "layers are cut by their class",
        ),
        ("OFFLOAD_PARAMS", ("FALSE",), "an attack gathers the weights many times a step"),
        ("STATE_DICT_TYPE", ("SHARDED_STATE_DICT",), "checkpoints are written in pieces"),
        ("RESHARD_AFTER_FORWARD", ("TRUE", "FALSE"), "FSDP2 knows two ways"),
        ("IGNORED_MODULES", ("",), "all of the network is trained"),
        ("FORWARD_PREFETCH", ("FALSE",), "it is not set here"),
        ("ACTIVATION_CHECKPOINTING_OFFLOAD", ("FALSE",), "it is not set here"),
        ("CPU_RAM_EFFICIENT_LOADING", ("FALSE",), "each process makes or loads the first weights"),
    )
}
# of DeepSpeed's configuration: what changes no number, and what the recipe says as well
_DEEPSPEED_FREE = (
    "aio", "comms_logger", "csv_monitor", "comet", "dump_state", "flops_profiler",
    "memory_breakdown", "steps_per_print", "tensorboard", "wall_clock_breakdown", "wandb",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 is to cut the network.

    Attributes:
        layers: Classes of modules that are gathered one by one.
        reshard_after_forward: Whether they are cut again between forward and backward.
        activation_checkpointing: Whether timm's blocks compute their activations twice.
        replicas: So many times the processes hold the network; each time some of them together.
    """

    layers: tuple[str, ...]
    reshard_after_forward: bool
    activation_checkpointing: bool
    replicas: int = 1


def read_launcher() -> Sharding | None:
    """Check what it asks for, and take FSDP2 from the environment: Accelerate is not to see it.

    Raises:
        ValueError: The key, what was found and what is allowed.
    """
    _check(_ALWAYS)
    parallel, sharded = _asks_for("PARALLELISM_CONFIG"), _asks_for("FSDP")
    if parallel:
        _check(_PARALLELISM)
        if not sharded:
            _refuse("parallelism_config cuts a model by FSDP2 alone: distributed_type: FSDP")
        del os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"]
    if not sharded:
        return None
    if "FSDP_VERSION" not in os.environ:  # of an Accelerate that has no other
        os.environ["FSDP_VERSION"] = "1"
    _check(_FSDP)
    layers = _layers()
    num_processes = launched_processes()
    if num_processes < 2:
        _refuse(
            "distributed_type: FSDP cuts a model over processes, and there is one: "
            "--num_processes 2 or more, or no launch configuration"
        )
    if not has_hooks():
        _refuse(
            "distributed_type: FSDP with train needs torch 2.9 or newer, found "
            f"{torch.__version__}: update torch, or use DDP or DeepSpeed"
        )
    plugin = FullyShardedDataParallelPlugin()
    del os.environ["ACCELERATE_USE_FSDP"]
    return Sharding(
        layers,
        bool(plugin.reshard_after_forward),
        plugin.activation_checkpointing,
        _replicas(num_processes) if parallel else 1,
    )


def as_launched(precision: str) -> str:
    """A recipe's ``train.precision``, or for ``auto`` the launcher's, where it names one.

    Raises:
        ValueError: They differ.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked == "no":
        return precision
    if precision not in ("auto", asked):
        raise ValueError(
            f"precision: {precision}, and the launch configuration's mixed_precision is {asked}: "
            f"set train.precision={asked}, or launch with --mixed_precision no"
        )
    return asked


def launched_processes() -> int:
    """How many the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_engine(settings: TrainSettings) -> tuple[bool, int]:
    """Refuse what Accelerate or DeepSpeed is asked for beside, or against, the recipe.

    Returns:
        Whether DeepSpeed is the engine, and the images of a micro-batch on a process.

    Raises:
        ValueError: The key, what was found and what is allowed.
    """
    micro_batch_size = settings.batch_size // (
        settings.gradient_accumulation * launched_processes()
    )
    recipe = {
        "train_batch_size": settings.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "gradient_clipping": settings.max_grad_norm or 0.0,
    }
    source, keys = "launch configuration", ("gradient_accumulation_steps", "gradient_clipping")
    _compare(source, {key: os.environ.get(f"ACCELERATE_{key.upper()}") for key in keys}, recipe)
    with_deepspeed = _asks_for("DEEPSPEED")
    if not with_deepspeed:
        return with_deepspeed, micro_batch_size
    zero: dict[str, Any] = {
        "stage": os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
        "offload_param": os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
    }
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if name != "none":
        source, given = name, _deepspeed_file(Path(name))
        zero = given["zero_optimization"]
        _compare(source, given, recipe)
    stage = zero.get("stage", 0)
    if str(stage) == "3":
        raise ValueError(
            f"{source}: ZeRO 3 is not possible with train, whose exchange of gradients and LAMB "
            "know ZeRO 0 to 2: FSDP2 cuts weights as well (recipe copy accelerate/fsdp2)"
        )
    if over := passed_over(zero):
        raise ValueError(
            f"{source}: {over} is ZeRO 3's, and DeepSpeed would pass over it at ZeRO {stage}: "
            "leave it out; gradients are sent as the recipe's communication says"
        )
    if settings.on_nonfinite == "skip" and str(stage) == "0":
        raise ValueError(
            "train.on_nonfinite: skip is not possible with DeepSpeed's ZeRO 0, which takes the "
            "step inside of its backward: use ZeRO 1, 2 or DDP, or stop"
        )
    return with_deepspeed, micro_batch_size


def _compare(source: str, given: dict[str, Any], recipe: dict[str, float]) -> None:
    for key, found in given.items():
        if found in (None, "auto", "none") or key in _DEEPSPEED_FREE:
            continue
        if isinstance(found, dict) and found.get("enabled") in (False, "auto"):
            continue
        if key not in recipe:
            raise ValueError(
                f"{source}: {key}: {json.dumps(found)[:100]} is not possible with train: the "
                "recipe says how a network is trained; allowed: auto, and freely "
                f"{', '.join(_DEEPSPEED_FREE)}"
            )
        if not _same(found, recipe[key]):
            raise ValueError(
                f"{source}: {key}: {found}, and by the recipe it is {recipe[key]}: leave it out, "
                "it is taken from the recipe"
            )


def _same(found: Any, number: float) -> bool:
    try:
        return float(found) == number
    except (TypeError, ValueError):
        return False


def _deepspeed_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as DeepSpeed's configuration: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: DeepSpeed's configuration is a mapping, found {content!r:.100}")
    if not isinstance(content.get("zero_optimization"), dict):
        raise ValueError(f"{path}: zero_optimization: missing, or no mapping")
    return content


def _layers() -> tuple[str, ...]:
    """By which the network is cut; Accelerate passes over them where its policy is another."""
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")
    layers = tuple(name.strip() for name in named if name.strip())
    by_class = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper() != "NO_WRAP"
    if layers and not by_class:
        _refuse(
            f"fsdp_transformer_layer_cls_to_wrap: {', '.join(layers)} without "
            "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP cuts nothing: set it, or name no class"
        )
    if by_class and not layers:
        _refuse(
            "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP needs the classes of the layers, "
            "fsdp_transformer_layer_cls_to_wrap; or set NO_WRAP: the network is gathered whole then"
        )
    return layers


def _replicas(num_processes: int) -> int:
    replicas, shards = (
        int(os.environ.get(f"PARALLELISM_CONFIG_DP_{what}_SIZE", "1"))
        for what in ("REPLICATE", "SHARD")
    )
    if shards < 2 or replicas * shards != num_processes:
        _refuse(
            f"parallelism_config_dp_replicate_size: {replicas} times "
            f"parallelism_config_dp_shard_size: {shards} must be the number of processes, "
            f"{num_processes}, and a network is cut in two or more"
        )
    return replicas


def _check(keys: Mapping[str, _Key]) -> None:
    for name, key in keys.items():
        found = os.environ.get(name, key.allowed[0])
        if found.upper() not in key.allowed:
            _refuse(
                f"{key.said}: {found} is not possible with train: {key.why}; allowed: "
                f"{' or '.join(key.allowed) or 'none'}"
            )


def _asks_for(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def _refuse(said: str) -> NoReturn:
    raise ValueError(f"launch configuration: {said}")
