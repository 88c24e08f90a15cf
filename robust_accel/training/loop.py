"""The training step, marked below, and the epoch around it: Algorithm A1 on Accelerate."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from robust_accel.attacks import Attack
from robust_accel.comm import Collective, GradientCompression
from robust_accel.comm.agreement import Agreement
from robust_accel.comm.heartbeat import Heartbeat
from robust_accel.data import TrainingBatches
from robust_accel.recipe import TrainSettings
from robust_accel.robust_model import RobustModel
from robust_accel.training.checkpoint import Checkpoint, Progress
from robust_accel.training.disk import check_there
from robust_accel.training.finite import Watch
from robust_accel.training.first_step import check_first_step, in_words
from robust_accel.training.metrics import Averages, Metrics, share_right
from robust_accel.training.stopping import Stop

logger = logging.getLogger(__name__)


@dataclass
class Loop:
    """What a step needs; ``run.py`` makes it.

    Attributes:
        robust_model: What ``model`` wraps: Accelerate's prepared form of it.
        attack: The recipe's, as it is after its warm-up.
        progress: Where the run stands; a resumed one begins there.
        averages: Of what the next line of ``metrics.jsonl`` tells.
        applied: What the first step of this process did, once it is done.
    """

    accelerator: Accelerator
    settings: TrainSettings
    batches: TrainingBatches
    model: nn.Module
    robust_model: RobustModel
    attack: Attack
    optimizer: Any
    schedule: Any
    ema: ModelEmaV3 | None
    progress: Progress
    watch: Watch
    metrics: Metrics
    checkpoint: Checkpoint
    compression: GradientCompression
    collective: Collective
    stop: Stop
    agreement: Agreement
    heartbeat: Heartbeat
    averages: Averages = field(default_factory=Averages)
    applied: dict[str, Any] | None = None

    def step(self, x: Tensor, labels: Tensor, num_labeled: float | None) -> dict[str, Tensor]:
        """x: [B, C, H, W] in [0, 1], labels: [B], of one micro-batch; the last: ``MinMax.loss``."""
        # ---- the training step: attack and outer loss are in the model's forward --------------
        with self.accelerator.accumulate(self.model):
            out = self.model(x, labels, num_labeled)
            self.accelerator.backward(out["loss"])
            norm = None
            if self.settings.max_grad_norm is not None and self.accelerator.sync_gradients:
                norm = self.accelerator.clip_grad_norm_(
                    self.model.parameters(), self.settings.max_grad_norm
                )
            if self.watch.allows(out["loss"], norm):
                self.optimizer.step()
            self.optimizer.zero_grad()
        # ----------------------------------------------------------------------------------------
        return out

    def epoch(self, epoch: int, last_step: int) -> int:
        """Train from where the run stands to the epoch's end, or to ``last_step``.

        Returns:
            0, or the signal by which a process was asked to stop; then the epoch may end early.
        """
        settings, progress = self.settings, self.progress
        request, first_step = 0, progress.step % self.batches.steps_per_epoch
        if self.averages.count == 0:
            self.averages.clear()  # its clock starts
        self.metrics.start_clock()
        self.model.train()
        self.watch.start()
        self.robust_model.min_max.attack = self._attack_in(epoch)
        if settings.awp is not None:
            self.robust_model.min_max.perturb_weights = epoch >= settings.awp.warmup_epochs
        for x, labels in self.batches.epoch(epoch, first_step, self.accelerator.device):
            if settings.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            out = self.step(x, labels, self.batches.num_labeled(progress.step))
            self.averages.add(out, labels)
            if not self.accelerator.sync_gradients:  # micro-batches of the step are to come
                continue
            taken = self.watch.settle()
            self.averages.settle(taken)
            self.schedule.step()
            progress.step += 1
            if self.ema is not None and taken:
                self.ema.update(self.robust_model.classifier, step=progress.step)
            if self.applied is None:
                self._check_first_step()
            self.metrics.advance()
            self.heartbeat.at("training", progress.step)
            request = self.agreement.highest(self.stop.after_step())
            if progress.step == last_step:  # no step comes in which the others would answer
                request = max(request, self.agreement.highest(0))
            if progress.step % settings.log_every == 0 or progress.step == last_step:
                self._log(x, labels)
                self.averages.clear()
            if request or progress.step == last_step:
                break
            if settings.checkpoint_every and progress.step % settings.checkpoint_every == 0:
                self.metrics.stop_clock()
                self.save()
                self.metrics.start_clock()
        self.metrics.stop_clock()
        return request

    def save(self) -> None:
        """Write a checkpoint, which no request to stop disturbs."""
        with self.stop.writing():
            if self.accelerator.is_main_process:
                check_there(self.checkpoint.folder)
            self.checkpoint.save()

    def _check_first_step(self) -> None:
        """Measure what it did, and say so; raise where it was not what was asked for."""
        decay = None if self.ema is None else self.ema.get_decay(self.progress.step)
        self.applied = check_first_step(
            self.robust_model,
            self.accelerator,
            self.collective,
            self.compression,
            decay,
            self.watch.check,
        )
        self.progress.applied = self.progress.applied or self.applied
        if self.applied is not None and (said := in_words(self.applied)):
            logger.info("first step: %s", said)

    def _attack_in(self, epoch: int) -> Attack:
        """The recipe's attack, weaker in its warm-up."""
        attack: Any = self.attack
        share = (epoch + 1) / max(1, self.settings.eps_warmup_epochs)
        if share >= 1:
            return attack
        sizes = {key: getattr(attack, key, None) for key in ("eps", "step_size")}
        return attack.model_copy(update={k: share * v for k, v in sizes.items() if v is not None})

    def _log(self, x: Tensor, labels: Tensor) -> None:
        # the clean accuracy is the last batch's alone
        clean = share_right(self.robust_model.predict(x), labels)
        images = self.averages.count * len(labels) * self.accelerator.num_processes
        self.metrics.log(self.averages, clean, images, self.optimizer.param_groups[0]["lr"])
        self.watch.check()
