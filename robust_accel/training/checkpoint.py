"""Checkpoints of everything that a run needs to continue as if nothing had happened."""

import itertools
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors.torch import load_file, save_file
from torch import nn

from robust_accel.comm.deepspeed import weights_only_loads
from robust_accel.files import give_to_umask, written_whole
from robust_accel.models.weight_files import check_checkpoint
from robust_accel.run_folder import RunFolder
from robust_accel.training.courier import Courier
from robust_accel.training.manifest import digest_of_file, discard, publish
from robust_accel.training.memory import Memory
from robust_accel.training.shards import Shards


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    best_accuracy: float = -1.0  # robust accuracy on the held-out split
    best_epoch: float = 0.0
    best_digest: str = ""  # SHA-256 of best.safetensors, which has these weights
    validations_since_best: int = 0
    train_seconds: float = 0.0
    comm_seconds: float = 0.0
    comm_exposed_seconds: float = 0.0  # not hidden behind the backward; NaN where nothing tells
    bytes_sent: int = 0  # by this rank, of gradients
    bytes_of_step: int = 0  # of them, in the last step
    bytes_of_weights_sent: int = 0  # which were in pieces
    stopped_early: bool = False
    skipped_steps: int = 0  # of those done: left out, see train.on_nonfinite
    skipped_in_a_row: int = 0
    applied: dict[str, Any] | None = None  # what the run's first step did
    good_step: int = 0  # of the last validation that met no collapse, where a run may go back
    rollbacks: list[str] = field(default_factory=list)  # why, for each
    to_validate: bool = False  # the epoch is over, and its validation is still to be done


class Stateful(Protocol):
    """The schedule, the gradient compression: anything with a state dict of plain values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Checkpoint:
    """Saves and restores a run: what Accelerate prepared, and what it does not know.

    Accelerate keeps weights (safetensors), optimizer, loss scaler and the random states of each
    process (with DeepSpeed, its own files, read without executing anything); this adds
    ``progress.pt`` (``weights_only``), the averaged weights and the best ones, and what attack and
    objective keep (``memory.py``). The order of the
    images needs no state: it follows from the seed, the step and the data.

    Args:
        parts: State that is the same on all processes.
        own: State that each process has for itself.
        averaged: The classifier with averaged weights, if it is whole.
        memory: A file a process, where there is something to keep.
        shards: Under FSDP2 weights, averaged weights and optimizer are theirs.
        keep: How many checkpoints are kept, the newest ones; beside them that of ``good_step``.
        about: The run's settings, data, engine and versions, for the manifest.
    """

    def __init__(
        self,
        folder: RunFolder,
        accelerator: Accelerator,
        progress: Progress,
        parts: dict[str, Stateful],
        own: Stateful,
        averaged: nn.Module | None,
        memory: Memory,
        check: Callable[[], None],
        shards: Shards | None = None,
        *,
        keep: int,
        about: dict[str, Any],
    ) -> None:
        self.check = check  # raises where something is not finite
        self.folder, self.accelerator, self.progress = folder, accelerator, progress
        self.parts, self.own, self.averaged = parts, own, averaged
        self.memory, self.shards = memory, shards
        self.keep, self.about = keep, about
        self._courier = Courier(accelerator, folder.absent)

    def save(self) -> None:
        """Write ``checkpoints/step-N`` whole if all is finite, then remove the older ones."""
        self.check()
        target = self.folder.checkpoints / f"step-{self.progress.step:08d}"
        new = target.with_name(f"incomplete-{target.name}")
        main = self.accelerator.is_main_process
        with self._courier.place(new) as place:
            if main:
                # by a run that was killed
                for left in self.folder.checkpoints.glob("*incomplete-*"):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                new.mkdir(parents=True)
            own = gather_object([self.own.state_dict()])
            self.accelerator.save_state(str(place))
            if self.shards is not None:
                self.shards.save(place)
            self.memory.save(place)
            if main:
                self._save_parts(new, own)
            names = self._courier.collect(place)
        if main:
            give_to_umask(new)
            publish(new, target, names, self.about | {"step": self.progress.step})
            good = self.folder.checkpoints / f"step-{self.progress.good_step:08d}"
            for path in self.folder.steps()[: -self.keep]:
                if path != good:
                    discard(path)
        self.accelerator.wait_for_everyone()

    def load(self, name: str, *, discards: bool = False) -> None:
        """Restore a checkpoint that was found whole.

        Args:
            discards: Remove newer ones, which else are damaged and put aside.
        """
        source = self.folder.checkpoints / name
        with_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        with self._courier.place(source) as place:
            self._courier.hand_out(place)
            check_checkpoint(place)
            with weights_only_loads() if with_deepspeed else nullcontext():
                self.accelerator.load_state(str(place))
            if self.shards is not None:
                self.shards.load(place)
            self._load_parts(place)
            self.memory.load(place)
        if self.accelerator.is_main_process:
            steps = self.folder.steps()
            for path in steps[steps.index(source) + 1 :]:
                if discards:
                    discard(path)
                else:  # out of the way, but not lost
                    path.rename(_unused(path.with_name(f"damaged-{path.name}")))

    def save_best(self, module: nn.Module) -> None:
        """Keep weights as the best ones; the first process does."""
        save_weights(module, self.folder.best)
        self.progress.best_digest = digest_of_file(self.folder.best)

    def load_best(self, module: nn.Module) -> None:
        """Load them, on the first process.

        Raises:
            ValueError: They are not what was saved.
        """
        load_weights(module, self._whole_best())

    def _whole_best(self) -> Path:
        """The best weights as they were saved, or their copy in a checkpoint."""
        best = self.folder.best
        for path in (best, *(step / best.name for step in reversed(self.folder.steps()))):
            if path.exists() and digest_of_file(path) == self.progress.best_digest:
                return path
        raise ValueError(
            f"{best} is not what was written, nor is a copy of it in a checkpoint: restore it, or "
            "start another run"
        )

    def _save_parts(self, folder: Path, own: list[dict[str, Any]]) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(state | {"progress": asdict(self.progress), "own": own}, folder / "progress.pt")
        if self.averaged is not None:
            save_weights(self.averaged, folder / "ema.safetensors")
        if self.progress.best_digest:
            shutil.copyfile(self._whole_best(), folder / self.folder.best.name)

    def _load_parts(self, folder: Path) -> None:
        state = torch.load(folder / "progress.pt", map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)
        if len(state["own"]) == self.accelerator.num_processes:
            self.own.load_state_dict(state["own"][self.accelerator.process_index])
        if self.averaged is not None:
            load_weights(self.averaged, folder / "ema.safetensors")
        if self.accelerator.is_main_process:
            self._restore_best(folder / self.folder.best.name)

    def _restore_best(self, kept: Path) -> None:
        """The best weights as of this checkpoint: a killed run may have found others since."""
        if kept.exists():
            with written_whole(self.folder.best) as temporary:
                shutil.copyfile(kept, temporary)
        else:
            self.folder.best.unlink(missing_ok=True)


def _unused(path: Path) -> Path:
    """This name, or with the first number behind it that nothing has."""
    names = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], names) if not name.exists())


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's state dict as safetensors, in one move."""
    with written_whole(path) as temporary:
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, temporary)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load what ``save_weights`` wrote, in place."""
    module.load_state_dict(load_file(path))
