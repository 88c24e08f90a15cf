"""AutoAttack (Croce and Hein 2020, arXiv 2003.01690) by ``pyautoattack``, a unit at a time."""

import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from pyautoattack import AutoAttack
from torch import Tensor

from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.models import PixelClassifier

ATTACKS_OF = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "quick": ("apgd-ce", "apgd-t"),
}
_MIN_CLASSES = 4  # the targeted DLR loss of APGD-T compares with the third-best class
_MAX_TARGETS = 9


class AutoAttackUnit:
    """Attacks one unit of images with the attacks of a version; later ones on survivors only.

    Raises:
        ValueError: The data have fewer classes than the targeted attacks need.
    """

    def __init__(self, settings: EvaluateSettings, num_classes: int, device: torch.device) -> None:
        assert settings.autoattack is not None
        if num_classes < _MIN_CLASSES:
            raise ValueError(
                f"evaluate.autoattack: {settings.autoattack} needs at least {_MIN_CLASSES} classes "
                f"(APGD-T's loss), the data have {num_classes}; set it to null"
            )
        self._attacks = list(ATTACKS_OF[settings.autoattack])
        self._norm = {"linf": "Linf", "l2": "L2"}[settings.norm or ""]
        self._eps, self._device = settings.eps, device
        self._num_targets = min(_MAX_TARGETS, num_classes - 1)

    def __call__(self, classifier: PixelClassifier, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        logging.getLogger("auto-attack").setLevel(logging.WARNING)
        with _global_state_kept():
            attack = AutoAttack(
                classifier,
                norm=self._norm,
                eps=self._eps,
                version="custom",
                attacks=self._attacks,
                seed=seed,
                device=self._device,
            )
            # what version="standard" sets, for any number of classes
            attack.apgd.n_restarts = 1
            attack.fab.n_restarts = 1
            attack.apgd_targeted.n_target_classes = self._num_targets
            attack.fab.n_target_classes = self._num_targets
            x_adv, _ = attack.run_standard_evaluation(x, labels, batch_size=len(x))
        return x_adv


@contextmanager
def _global_state_kept() -> Iterator[None]:
    """AutoAttack reseeds the global generators and ends all tracing: put them back."""
    trace = sys.gettrace()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            sys.settrace(trace)
