"""The training step, marked below, and the epoch around it: Algorithm A1 on Accelerate."""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from robust_accel.attacks import Attack
from robust_accel.attacks.multi_norm import of_step
from robust_accel.attacks.strength import scaled
from robust_accel.comm import Collective, GradientCompression
from robust_accel.comm.agreement import Agreement
from robust_accel.comm.heartbeat import Heartbeat
from robust_accel.data import TrainingBatches, seeded_generator
from robust_accel.recipe import TrainSettings
from robust_accel.robust_model import RobustModel
from robust_accel.training.averaging import EpochMean
from robust_accel.training.checkpoint import Checkpoint, Progress
from robust_accel.training.disk import check_there
from robust_accel.training.finite import Watch
from robust_accel.training.first_step import check_first_step, in_words
from robust_accel.training.memory import Memory
from robust_accel.training.metrics import Averages, Metrics, count_right
from robust_accel.training.shards import Shards
from robust_accel.training.stopping import Stop

logger = logging.getLogger(__name__)

_ATTACK = 10  # among the keys of seeded draws


@dataclass
class Loop:
    """What a step needs; ``run.py`` makes it.

    Attributes:
        robust_model: What ``model`` wraps: Accelerate's prepared form of it.
        attack: The recipe's, as it is after its warm-up.
        progress: Where the run stands; a resumed one begins there.
        averages: Of what the next line of ``metrics.jsonl`` tells.
        shards: By which the model is cut, under FSDP2.
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
    average: ModelEmaV3 | None
    memory: Memory
    progress: Progress
    watch: Watch
    metrics: Metrics
    checkpoint: Checkpoint
    compression: GradientCompression
    collective: Collective
    stop: Stop
    agreement: Agreement
    heartbeat: Heartbeat
    shards: Shards | None = None
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
        if first_step == 0:
            self.memory.begin(epoch)
        if settings.awp is not None:
            self.robust_model.min_max.perturb_weights = epoch >= settings.awp.warmup_epochs
        indices = self.batches.indices(epoch, first_step)
        for x, labels in self.batches.epoch(epoch, first_step, self.accelerator.device):
            generator = seeded_generator(settings.seed, _ATTACK, progress.step)
            attack = of_step(scaled(self.attack, self.share_of_eps()), generator)
            self.robust_model.min_max.attack = self.memory.attack_on(attack, next(indices))
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
            self._update_average(taken, epoch + 1 if progress.step == last_step else None)
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
        decay = None
        if self.average is not None and not isinstance(self.average, EpochMean):
            decay = self.average.get_decay(self.progress.step)
        self.applied = check_first_step(
            self.robust_model,
            self.accelerator,
            self.collective,
            self.compression,
            decay,
            self.watch.check,
            shards=self.shards,
        )
        self.progress.applied = self.progress.applied or self.applied
        if self.applied is not None and (said := in_words(self.applied)):
            logger.info("first step: %s", said)

    def share_of_eps(self) -> float:
        """How much of its eps the recipe's attack has in the step under way, in (0, 1]."""
        settings, steps_per_epoch = self.settings, self.batches.steps_per_epoch
        if settings.eps_schedule is not None:
            done = (self.progress.step + 1) / steps_per_epoch
            return settings.eps_schedule.share(done, settings.epochs)
        epoch = self.progress.step // steps_per_epoch
        return min(1.0, (epoch + 1) / max(1, settings.eps_warmup_epochs))

    def _update_average(self, taken: bool, epochs: int | None) -> None:
        """After a step: whether it was taken, and, where an epoch ends by it, how many are done."""
        average, classifier = self.average, self.robust_model.classifier
        if isinstance(average, EpochMean):
            if epochs is not None:
                average.update(classifier, step=epochs)
        elif average is not None and taken:
            average.update(classifier, step=self.progress.step)

    def _log(self, x: Tensor, labels: Tensor) -> None:
        # the clean accuracy is the last batch's alone
        clean = count_right(self.robust_model.predict(x), labels)
        images = self.averages.count * len(labels) * self.accelerator.num_processes
        # the classifier's: optimizer.layer_decay leaves the layers below it less
        about = {"lr": max(group["lr"] for group in self.optimizer.param_groups)}
        attack: Any = self.robust_model.min_max.attack  # the last step's
        if self.settings.grows_eps:
            about["attack_eps"] = attack.eps
        self.metrics.log(self.averages, clean, images, about)
        self.watch.check()
