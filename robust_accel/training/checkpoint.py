"""Checkpoints of everything that a run needs to continue as if nothing had happened."""

import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn

from robust_accel.comm.deepspeed import weights_only_loads
from robust_accel.files import give_to_umask, written_whole
from robust_accel.models.weight_files import check_checkpoint
from robust_accel.run_folder import RunFolder

DataIdentity = dict[str, dict[str, int | str]]
"""Of each set that training sees, how many images it has and their digest: ``Data.identity``."""


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    best_accuracy: float = -1.0  # robust accuracy on the held-out split
    best_epoch: float = 0.0
    validations_since_best: int = 0
    train_seconds: float = 0.0
    comm_seconds: float = 0.0
    comm_exposed_seconds: float = 0.0  # not hidden behind the backward
    bytes_sent: int = 0  # by this rank
    stopped_early: bool = False


class Stateful(Protocol):
    """The schedule, the gradient compression: anything with a state dict of plain values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Checkpoint:
    """Saves and restores a run: what Accelerate prepared, and what it does not know.

    Accelerate keeps weights (safetensors), optimizer, loss scaler and the random states of each
    process (with DeepSpeed, its own files, read without executing anything); this adds
    ``progress.pt`` (``weights_only``) and the averaged weights. The order of the images needs no
    state: it follows from the seed, the step and the data, whose identity is kept.
    """

    def __init__(
        self,
        folder: RunFolder,
        accelerator: Accelerator,
        progress: Progress,
        parts: dict[str, Stateful],
        ema: nn.Module | None,
        data: DataIdentity,
    ) -> None:
        self.folder, self.accelerator, self.progress = folder, accelerator, progress
        self.parts, self.ema, self.data = parts, ema, data

    def save(self) -> None:
        """Write ``checkpoints/step-N`` whole, then remove the older ones."""
        target = self.folder.checkpoints / f"step-{self.progress.step:08d}"
        new = target.with_name("incomplete")
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(new))
        if main:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state["progress"] = asdict(self.progress)
            state["num_processes"] = self.accelerator.num_processes
            state["data"] = self.data
            torch.save(state, new / "progress.pt")
            if self.ema is not None:
                save_weights(self.ema, new / "ema.safetensors")
        self.accelerator.wait_for_everyone()
        if main:
            older = [path for path in self.folder.steps() if path != target]
            give_to_umask(new)
            shutil.rmtree(target, ignore_errors=True)
            new.rename(target)
            for path in older:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def load(self) -> int:
        """Restore the newest checkpoint; returns the number of processes that wrote it."""
        source = self.folder.steps()[-1]
        check_checkpoint(source)
        with_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        with weights_only_loads() if with_deepspeed else nullcontext():
            self.accelerator.load_state(str(source))
        state = _progress(source)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)
        if self.ema is not None:
            load_weights(self.ema, source / "ema.safetensors")
        return int(state["num_processes"])


def check_same_data(folder: RunFolder, data: DataIdentity) -> None:
    """Refuse to go on with other data than the newest checkpoint's.

    Checkpoints that do not say what their data were pass.

    Args:
        data: From ``Data.identity``.

    Raises:
        ValueError: ``path: ...``: images are more, fewer or others, or have other labels.
    """
    known: DataIdentity = _progress(folder.steps()[-1]).get("data", data)
    for name in sorted(known.keys() | data.keys()):
        was, found = (_in_words(of.get(name)) for of in (known, data))
        if was != found:
            raise ValueError(
                f"path: the run has trained on {was} as {name}, and now there are {found}: it goes "
                "on only with the same data in the same order; restore them, or start another run"
            )


def _in_words(about: dict[str, int | str] | None) -> str:
    if about is None:
        return "no images"
    return f"{about['images']} images (digest {str(about['digest'])[:12]})"


def _progress(checkpoint: Path) -> dict[str, Any]:
    return torch.load(checkpoint / "progress.pt", map_location="cpu", weights_only=True)


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's state dict as safetensors, in one move."""
    with written_whole(path) as temporary:
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, temporary)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load what ``save_weights`` wrote, in place."""
    module.load_state_dict(load_file(path))
