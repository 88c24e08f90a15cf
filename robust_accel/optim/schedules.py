"""Learning-rate schedules: pure functions of progress that multiply the base learning rate."""

import math
from abc import abstractmethod
from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from robust_accel.settings import Number, Settings, Whole


class Schedule(Settings):
    """What every schedule shares: a warm-up, and a factor at any point of the run.

    Warm-up epoch k = 1, 2, ..., ``warmup_epochs`` runs at (k / warmup_epochs) times the base
    learning rate, constant within the epoch (section 4.1 of DAT). These epochs belong to the run.

    Args:
        warmup_epochs: Whole epochs at a rate that grows to the base rate, >= 0; one, which runs at
            the base rate, is as good as none.
    """

    warmup_epochs: Annotated[Whole, Ge(0)] = 0

    def factor(self, epoch: float, total_epochs: float) -> float:
        """What the base learning rate is multiplied by, >= 0.

        Args:
            epoch: Epochs done so far, >= 0; a fraction within an epoch (steps / steps_per_epoch).
            total_epochs: Length of the run, warm-up included, > warmup_epochs.
        """
        if epoch < self.warmup_epochs:
            return (math.floor(epoch) + 1) / self.warmup_epochs
        return self.after_warmup(min(epoch, total_epochs), total_epochs)

    @abstractmethod
    def after_warmup(self, epoch: float, total_epochs: float) -> float:
        """The factor at ``warmup_epochs <= epoch <= total_epochs``."""
        ...

    def check(self, epochs: float) -> None:
        """Raise ValueError if a run of that many epochs is too short for the schedule."""
        if not self.warmup_epochs < epochs:
            raise ValueError(
                f"schedule.warmup_epochs must be < epochs = {epochs}, got {self.warmup_epochs}"
            )

    def doubts(self, epochs: float) -> list[str]:
        """What is set and does nothing in a run of that many epochs."""
        if self.warmup_epochs != 1:
            return []
        return [
            "schedule.warmup_epochs: 1 does nothing: its epoch runs at the base rate; from 2 on "
            "the rate grows, epoch by epoch"
        ]


class Constant(Schedule):
    """The base learning rate from the warm-up to the end."""

    def after_warmup(self, epoch: float, total_epochs: float) -> float:
        return 1.0


def _increasing(milestones: tuple[float, ...]) -> tuple[float, ...]:
    if any(milestone <= 0 for milestone in milestones):
        raise ValueError(f"milestones must be > 0, got {list(milestones)}")
    if any(a >= b for a, b in pairwise(milestones)):
        raise ValueError(f"milestones must increase, got {list(milestones)}")
    return milestones


class Piecewise(Schedule):
    """Multiplies the learning rate by ``gamma`` at each milestone.

    The paper trains for 30 epochs with milestones 20, 25, 28, and runs its 5 warm-up epochs before
    them. Here they count: that run is ``epochs: 35, milestones: [25, 30, 33], warmup_epochs: 5``.

    Args:
        milestones: Epochs > 0 from the start of the run, increasing, fractions allowed. The rate
            falls at the first step at which that many epochs are done.
        gamma: What the rate is multiplied by, in (0, 1].

    Source: section 4.1 of DAT.
    """

    milestones: Annotated[tuple[Number, ...], AfterValidator(_increasing)]
    gamma: Annotated[Number, Gt(0), Le(1)] = 0.1

    def after_warmup(self, epoch: float, total_epochs: float) -> float:
        # >=, not ==: a milestone between two steps must not be missed
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)

    def check(self, epochs: float) -> None:
        super().check(epochs)
        early = [milestone for milestone in self.milestones if milestone < self.warmup_epochs]
        if early:
            raise ValueError(
                f"schedule.milestones must be >= warmup_epochs = {self.warmup_epochs}, got {early}"
            )

    def doubts(self, epochs: float) -> list[str]:
        doubts = super().doubts(epochs)
        late = [milestone for milestone in self.milestones if milestone >= epochs]
        if late:  # no fault: shortening a run to try it out is no mistake
            doubts += [f"schedule.milestones {late} are not before the end of {epochs} epochs"]
        return doubts


class Cyclic(Schedule):
    """One triangle: from 0 up to the base learning rate, and down to 0 at the end.

    Args:
        peak: Where the base learning rate is reached, a fraction in (0, 1) of the epochs after the
            warm-up. Fast AT's code for CIFAR-10 has it at 1/2; Rice et al. (arXiv 2002.11569) at
            2/5.
        warmup_epochs: Of ``Schedule``, >= 0; the triangle itself begins at 0 and rarely needs one.

    Source: Wong et al. 2020 (arXiv 2001.03994). DAT's section 4.2 finds it poor at large batches.
    """

    peak: Annotated[Number, Gt(0), Lt(1)] = 0.5

    def after_warmup(self, epoch: float, total_epochs: float) -> float:
        progress = (epoch - self.warmup_epochs) / (total_epochs - self.warmup_epochs)
        if progress <= self.peak:
            return progress / self.peak
        return (1 - progress) / (1 - self.peak)


class Cosine(Schedule):
    """Half a cosine from the base learning rate to ``final_factor`` times it.

    Args:
        final_factor: In [0, 1], reached when the last epoch is done.

    Source: Loshchilov and Hutter 2017 (arXiv 1608.03983), without restarts.
    """

    final_factor: Annotated[Number, Ge(0), Le(1)] = 0.0

    def after_warmup(self, epoch: float, total_epochs: float) -> float:
        progress = (epoch - self.warmup_epochs) / (total_epochs - self.warmup_epochs)
        return _anneal(1.0, self.final_factor, progress, "cosine")


class OneCycle(Schedule):
    """Up from 1 / ``div_factor`` to 1, then down to 1 / (``div_factor final_div_factor``).

    The base learning rate is the peak. torch's OneCycleLR puts its turning points one step
    earlier and sets momentum too.

    Args:
        pct_start: Where the peak is, a fraction in (0, 1) of the epochs after the warm-up.
        div_factor: The rate begins at this part of the peak, >= 1.
        final_div_factor: It ends at this part of where it began, >= 1.
        anneal: ``cosine`` or ``linear``.
        warmup_epochs: Of ``Schedule``, >= 0; the rise is one already, and rarely needs another.

    Source: Smith and Topin 2018 (arXiv 1708.07120).
    """

    pct_start: Annotated[Number, Gt(0), Lt(1)] = 0.3
    div_factor: Annotated[Number, Ge(1)] = 25.0
    final_div_factor: Annotated[Number, Ge(1)] = 1e4
    anneal: Literal["cosine", "linear"] = "cosine"

    def after_warmup(self, epoch: float, total_epochs: float) -> float:
        progress = (epoch - self.warmup_epochs) / (total_epochs - self.warmup_epochs)
        start = 1 / self.div_factor
        if progress <= self.pct_start:
            return _anneal(start, 1.0, progress / self.pct_start, self.anneal)
        fall = (progress - self.pct_start) / (1 - self.pct_start)
        return _anneal(1.0, start / self.final_div_factor, fall, self.anneal)


def _anneal(start: float, end: float, progress: float, shape: str) -> float:
    """From start at progress 0 to end at progress 1."""
    if shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * progress


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Constant,
    "cosine": Cosine,
    "cyclic": Cyclic,
    "onecycle": OneCycle,
    "piecewise": Piecewise,
}


def make_scheduler(
    optimizer: Optimizer, schedule: Schedule, *, epochs: float, steps_per_epoch: int
) -> LambdaLR:
    """A torch scheduler to be stepped once after every optimizer step.

    Do not pass it to ``Accelerator.prepare``: a prepared scheduler steps once a process.

    Args:
        optimizer: Its groups' present learning rates are the base that the factor multiplies.
        schedule: One of ``SCHEDULES``. What it has and does nothing in so many epochs, its
            ``doubts`` say.
        epochs: Length of the run, > 0.
        steps_per_epoch: Optimizer steps in an epoch, >= 1.

    Raises:
        ValueError: The run is too short for the schedule, or ``steps_per_epoch`` < 1.
    """
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch must be >= 1, got {steps_per_epoch}")
    schedule.check(epochs)
    # a function, whose state torch does not save: the recipe has the settings, the checkpoint
    # the step. steps / steps_per_epoch is exact at whole epochs
    return LambdaLR(optimizer, lambda step: schedule.factor(step / steps_per_epoch, epochs))
