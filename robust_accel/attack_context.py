"""What an attack may not change: modes, buffers and parameters of the model that it looks at."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

AttackMode = Literal["eval", "train"]


@contextmanager
def attack_context(module: nn.Module, mode: AttackMode, *, freeze: bool = True) -> Iterator[None]:
    """Put each submodule in the mode, and leave everything behind as it was.

    Flags are set one by one: an ``eval()``/``train()`` round trip would unfreeze the BatchNorm
    layers that a user froze. Buffers that have moved (BatchNorm's statistics, InstanceNorm's,
    spectral norm's vectors) are put back. FSDP2 exchanges no gradients meanwhile: in each backward,
    an attack's as well, it would send what earlier micro-batches have accumulated.

    Args:
        mode: ``eval``, or ``train``: each submodule keeps its own mode.
        freeze: Parameters require no gradient meanwhile: AOTAutograd (``torch.compile``)
            differentiates in every input that does, and some attacks call ``backward``. Sharded
            parameters are left alone, whose engines look at that flag themselves.
    """
    training = [(m, m.training) for m in module.modules()]
    buffers = [(m, name, b) for m in module.modules() for name, b in m._buffers.items()]
    # what repeats one element cannot be written in place either
    written = [b for _, _, b in buffers if b is not None and 0 not in b.stride()]
    values = [b.clone() for b in written]
    trained = [p for p in module.parameters() if p.requires_grad and p.is_leaf and is_whole(p)]
    trained = trained if freeze else []
    exchanging = [(m, *_gradient_sync(m)) for m, _ in training if isinstance(m, FSDPModule)]
    try:
        for part, *_ in exchanging:
            part.set_requires_gradient_sync(False, recurse=False)
        if mode == "eval":
            for m, _ in training:
                m.training = False
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for m, flag in training:
            m.training = flag
        for part, reduces, between_replicas in exchanging:
            part.set_requires_gradient_sync(reduces, recurse=False)
            part.set_requires_all_reduce(between_replicas, recurse=False)
        for p in trained:
            p.requires_grad_(True)
        for m, name, b in buffers:  # where another tensor was put there
            m._buffers[name] = b
        if written:  # as BatchNorm does it: an earlier graph that has saved one need not know
            torch._foreach_copy_([b.data for b in written], values)
        # casts that autocast has kept: they belong to weights as the attack saw them
        torch.clear_autocast_cache()


def _gradient_sync(module: FSDPModule) -> tuple[bool, bool]:
    """Whether it exchanges gradients, and between replicas: what FSDP2 sets, and does not tell."""
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # before some torch it was one, or none
    groups = [state._fsdp_param_group] if groups is None else groups
    flags = [(g.reduce_grads, g.all_reduce_grads) for g in groups if g is not None]
    return flags[0] if flags else (True, True)


def is_whole(parameter: Tensor) -> bool:
    """Whether it is no piece of FSDP's (1 or 2) or of ZeRO 3's."""
    marks = ("ds_id", "_is_flat_param", "_fsdp_flattened")
    return not isinstance(parameter, DTensor) and not any(hasattr(parameter, m) for m in marks)
