"""Averages of the weights, which are then what is measured and left: a moving one, or of epochs."""

from typing import Any

from timm.utils import ModelEmaV3
from torch import nn

from robust_accel.recipe import TrainSettings


class EpochMean(ModelEmaV3):
    """The mean of the weights after each epoch from one on; before it, those of the last epoch.

    BatchNorm's running statistics are averaged as the weights are.

    Source: Izmailov et al. 2018 (arXiv 1803.05407), who compute the statistics anew.
    """

    def __init__(self, model: nn.Module, start: int, foreach: bool = True) -> None:
        super().__init__(model, foreach=foreach)
        self._start = start

    def get_decay(self, step: int | None = None) -> float:
        """What is left of the mean so far.

        Args:
            step: Epochs done, which are counted in place of steps.
        """
        assert step is not None
        taken = max(0, step - self._start)
        return taken / (taken + 1)


def make_average(
    settings: TrainSettings, classifier: nn.Module, *, sharded: bool = False
) -> ModelEmaV3 | None:
    """What the recipe asks for: by ``ema_decay``, by ``swa_start``, or nothing.

    Args:
        sharded: Both will be cut into pieces, of which torch updates one after another.
    """
    if settings.ema_decay is not None:
        one_by_one: Any = {"foreach": False} if sharded else {}
        about: Any = {"decay": settings.ema_decay, "use_warmup": True, "warmup_power": 1.0}
        return ModelEmaV3(classifier, **about, **one_by_one)
    if settings.swa_start is not None:
        return EpochMean(classifier, settings.swa_start, foreach=not sharded)
    return None
