"""What a run does about robust accuracy that is gone: it says so, ends, or goes back and on."""

import logging
from typing import Any, NoReturn

from accelerate import Accelerator
from accelerate.utils import set_seed

from robust_accel.data import Data
from robust_accel.processes import decided
from robust_accel.recipe import Recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.checkpoint import Checkpoint, Progress
from robust_accel.training.collapse import Fall
from robust_accel.training.facts import falls_of
from robust_accel.training.manifest import read_whole

logger = logging.getLogger(__name__)

_SLOWER = 0.5  # what the rate is multiplied by at each going back
_OTHER_DRAWS = 1_000_003  # added to the seed for each


class Collapse:
    """Watches a run's validations, by ``train.on_collapse``.

    Going back: weights, averages, optimizer, counters, metrics and what attack and objective keep
    are as they were after the last validation without a fall. From there the rate is half of what
    it was, and attacks and dropout draw other numbers; images come in the same order. It is written
    as a checkpoint before anything else, so a run that is stopped goes on from there.

    A continued run may have another ``train.on_collapse``: what lasts, and was only warned of, is
    then acted on.

    Args:
        recipe: With ``train``.
        progress: Gets the step to go back to, and what was gone back from.
        schedule, optimizer: Of the rate; a ``LambdaLR``, and as Accelerate has prepared it.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        folder: RunFolder,
        accelerator: Accelerator,
        progress: Progress,
        checkpoint: Checkpoint,
        schedule: Any,
        optimizer: Any,
    ) -> None:
        assert recipe.train is not None
        self._recipe, self._settings, self._data = recipe, recipe.train, data
        self._folder, self._accelerator = folder, accelerator
        self._progress, self._checkpoint = progress, checkpoint
        self._schedule, self._optimizer = schedule, optimizer

    def judge(self) -> None:
        """A validation is written: where nothing is gone, its step is one to go back to."""
        if not any(fall.lasts for fall in self._falls()):
            self._progress.good_step = self._progress.step

    def look(self, since: int) -> None:
        """Tell of falls since an epoch, and do what the recipe says; then a checkpoint is due."""
        self._meet([fall for fall in self._falls() if fall.epoch > since])

    def take_up(self) -> bool:
        """A run is continued: do what the recipe says now about what lasts since before.

        Returns:
            Whether a checkpoint is due.

        Raises:
            RecipeError: It says rollback, and no checkpoint from before the fall is kept.
        """
        lasting = [fall for fall in self._falls() if fall.lasts]
        ended = self._progress.stopped_early and not self._can_go_back
        if not lasting or self._settings.on_collapse == "warn" or ended:
            return False
        if self._settings.on_collapse == "rollback" and self._progress.good_step == 0:
            self._refuse(lasting[-1])
        self._meet(lasting)
        return True

    def _refuse(self, fall: Fall) -> None:
        def refuse() -> NoReturn:
            raise ValueError(
                f"on_collapse: rollback: {fall.text}; no checkpoint from before that is kept: "
                "choose warn or stop, or start another run"
            )

        self._recipe.checked("train", refuse)

    def _meet(self, fallen: list[Fall]) -> None:
        if fallen and self._can_go_back:
            self._go_back(fallen[-1].text)
            return
        ends = bool(fallen) and self._settings.on_collapse != "warn"
        for fall in fallen:
            logger.warning(f"{fall.text}; training ends here" if ends else fall.text)
        self._progress.stopped_early |= ends

    @property
    def _can_go_back(self) -> bool:
        settings, progress = self._settings, self._progress
        left = settings.max_rollbacks - len(progress.rollbacks)
        return settings.on_collapse == "rollback" and left > 0 and progress.good_step > 0

    def _falls(self) -> list[Fall]:
        def find() -> list[Fall]:
            return falls_of(self._folder.read_metrics(), self._recipe, self._data)

        return decided(find, self._accelerator)

    def _go_back(self, why: str) -> None:
        progress, settings = self._progress, self._settings
        rollbacks, left = [*progress.rollbacks, why], progress.step
        good = self._folder.checkpoints / f"step-{progress.good_step:08d}"
        decided(lambda: read_whole(good), self._accelerator)
        self._checkpoint.load(good.name, discards=True)
        progress.rollbacks = rollbacks
        self._schedule.base_lrs = [_SLOWER * rate for rate in self._schedule.base_lrs]
        for group in self._optimizer.param_groups:
            group["lr"] *= _SLOWER
        set_seed(settings.seed + _OTHER_DRAWS * len(rollbacks), device_specific=True)
        if self._accelerator.is_main_process:
            self._folder.truncate_metrics(progress.step)
        logger.warning(
            f"{why}; back from step {left} to {progress.step}, with half the rate "
            f"({len(rollbacks)} of at most {settings.max_rollbacks})"
        )
