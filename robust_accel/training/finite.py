"""Numbers that are none: noted on the device, told before anything is kept, and steps left out."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, reduce
from torch import Tensor, nn

from robust_accel.evaluation.ledger import told_to_all
from robust_accel.optim.sharded import local, whole
from robust_accel.recipe import TrainSettings
from robust_accel.run_folder import RunFolder
from robust_accel.training.checkpoint import Progress

_NEVER = 1 << 62
_NOTED = ("the loss", "the gradient")


class Watch:
    """Sees to it that losses, gradients and all that a checkpoint holds are finite.

    By ``train.on_nonfinite: stop`` a step notes on the device, without waiting for it, whether its
    losses and its averaged gradient are; ``check`` reads the notes. By ``skip``, all processes
    agree before a step is taken (one small message, and a wait for the device): one that has met
    NaN or Inf on any of them leaves weights, optimizer, moving average and buffers as they were on
    all, while the schedule and the order of the images go on. A loss scaler (fp16), and DeepSpeed's
    ZeRO 1 and 2, leave out steps whose gradients overflow by themselves: these are counted.

    Args:
        model: Its parameters are what is trained.
        optimizer: As Accelerate has prepared it.
        ema: The averaged model.
        progress: Gets the number of steps that were left out.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: TrainSettings,
        folder: RunFolder,
        progress: Progress,
        model: nn.Module,
        optimizer: Any,
        ema: nn.Module | None,
    ) -> None:
        self._accelerator, self._settings, self._folder = accelerator, settings, folder
        self._progress, self._model, self._optimizer, self._ema = progress, model, optimizer, ema
        self._skips = settings.on_nonfinite == "skip"
        with_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        self._scales = settings.precision == "fp16"  # gradients that overflow are its daily bread
        self._sees_gradients = not (with_deepspeed or self._scales)
        # some networks hold masks of -inf
        self._masks = {name for name, b in model.named_buffers() if b.isinf().any()}
        no = torch.zeros((), dtype=torch.bool, device=accelerator.device)
        self._loss = self._no = no  # whether one of this step's is not finite
        self._since = torch.full((2,), _NEVER, device=accelerator.device)  # as _NOTED, the steps
        self._left_out = False
        self._buffers: list[Tensor] = []

    def start(self) -> None:
        """Training begins, or goes on after something else has run the model."""
        if self._skips:
            self._buffers = [buffer.clone() for buffer in self._model.buffers()]

    def allows(self, loss: Tensor, norm: Tensor | None) -> bool:
        """Whether the optimizer may step, after a micro-batch's backward.

        Args:
            norm: Of the gradient, if it is known already.
        """
        self._loss = self._loss | ~loss.detach().isfinite()
        if not self._accelerator.sync_gradients:
            return True
        gradient = self._no
        if self._sees_gradients:
            gradient = ~(self._gradient_norm() if norm is None else whole(norm)).isfinite()
        noted, self._loss = torch.stack([self._loss, gradient]), self._no
        self._left_out = False
        if not self._skips:
            step = self._progress.step + 1
            self._since = torch.where(noted, self._since.clamp(max=step), self._since)
        elif self._sees_gradients:
            self._left_out = bool(reduce(noted.any().float(), "sum") > 0)
        return not self._left_out

    def settle(self) -> bool:
        """Whether the step was taken: the same on all processes.

        Raises:
            FloatingPointError: Too many in a row were not.
        """
        progress, most = self._progress, self._settings.max_skipped_in_a_row
        if not (self._left_out or self._optimizer.step_was_skipped):
            progress.skipped_in_a_row = 0
            if self._buffers:
                torch._foreach_copy_(self._buffers, list(self._model.buffers()))
            return True
        if not (self._skips or self._scales):  # DeepSpeed has not asked
            self._since[1].clamp_(max=progress.step + 1)
            return False
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        if self._buffers:
            torch._foreach_copy_(list(self._model.buffers()), self._buffers)
        if progress.skipped_in_a_row > most:
            self.stop(
                f"steps {progress.step + 1 - most} to {progress.step + 1} all met losses or "
                f"gradients that are not finite; train.max_skipped_in_a_row allows {most}"
            )
        return False

    def check(self, loaded: Path | None = None) -> None:
        """See whether all that is about to be kept or measured is finite, on all processes.

        Args:
            loaded: Where it was just read from.

        Raises:
            FloatingPointError: On all processes: what is not on one of them, and since when.
        """
        whole = _all_finite(tensor for _, tensor in self._state()).to(self._since)
        found = self._accelerator.gather(torch.cat([self._since, whole.view(1)])).view(-1, 3)
        *notes, wholes = found.T.tolist()
        steps = [step for note in notes for step in note]
        if min(steps) == _NEVER and all(wholes):
            return
        names = [name for name, tensor in self._state() if not tensor.isfinite().all()]
        of_each = told_to_all([names], self._accelerator)
        if min(steps) == _NEVER and not any(of_each):
            return  # finite, and so large that a sum of squares is not
        what = [
            f"{name} since step {min(note)}{_where([step == min(note) for step in note])}"
            for name, note in zip(_NOTED, notes, strict=True)
            if min(note) < _NEVER
        ]
        if some := [name for names in of_each for name in names][: max(map(len, of_each))]:
            more = f" and {len(some) - 1} more" if len(some) > 1 else ""
            what.append(f"{some[0]}{more}{_where(list(map(bool, of_each)))}")
        if loaded is not None:
            raise FloatingPointError(
                f"{loaded} holds numbers that are not finite: {', '.join(what)}; it is no good: "
                "remove it"
            )
        self.stop(f"step {self._progress.step}: not all numbers are finite: {', '.join(what)}")

    def stop(self, why: str) -> NoReturn:
        """End the run in a sentence.

        Raises:
            FloatingPointError: With what is left, and what can be done.
        """
        steps, advice = self._folder.steps(), "a smaller optimizer.lr, or train.max_grad_norm"
        last = "there is no checkpoint yet"
        if steps:
            last = f"the last good checkpoint is {steps[-1]}"
            if not self._skips:
                last += ", from which --resume train.on_nonfinite=skip goes on without such steps"
        if self._settings.precision != "fp32":
            advice += ", or train.precision=fp32"
        raise FloatingPointError(f"{why}; {last}; another run may do with {advice}")

    def _gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients))

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """All that a checkpoint holds of this process, by names for people."""
        yield from ((name, local(tensor, tensor)) for name, tensor in self._held())

    def _held(self) -> Iterator[tuple[str, Tensor]]:
        names = {id(p): _short(name) for name, p in self._model.named_parameters()}
        yield from ((f"parameter {_short(n)}", p) for n, p in self._model.named_parameters())
        for name, tensor in self._model.named_buffers():
            if name not in self._masks:
                yield f"buffer {_short(name)}", tensor
        if self._ema is not None:
            for name, tensor in self._ema.state_dict().items():
                if f"classifier.{name}" not in self._masks:
                    yield f"moving average of {_short(name)}", tensor
        optimizer = self._optimizer
        while hasattr(optimizer, "optimizer"):  # Accelerate's wrapper, ZeRO's
            optimizer = optimizer.optimizer
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name = names.get(id(parameter), "a shard")
            if id(parameter) not in names:
                yield f"weights of {name}", parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"optimizer's {key} of {name}", value


def _short(name: str) -> str:
    return name.removeprefix("classifier.").removeprefix("model.")


def _where(affected: list[bool]) -> str:
    """``(process 1 of 2)``; nothing where there is one process."""
    if len(affected) == 1:
        return ""
    ranks = [str(rank) for rank, it_is in enumerate(affected) if it_is]
    return f" (process{'es' * (len(ranks) > 1)} {', '.join(ranks)} of {len(affected)})"


@torch.no_grad()
def _all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """A bool, false too where squares overflow: norms are several times faster than a look."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    norms = [torch.stack(torch._foreach_norm(same)) for same in kinds.values()]
    return torch.stack([norm.isfinite().all().cpu() for norm in norms]).all()
