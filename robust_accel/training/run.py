"""A training run: what is prepared once, validation, and what it leaves. The step: ``loop.py``."""

import logging
import shlex
import signal
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed

from robust_accel.comm import compress_gradients
from robust_accel.comm.agreement import Agreement
from robust_accel.comm.heartbeat import Heartbeat
from robust_accel.console import is_main
from robust_accel.data import Data
from robust_accel.evaluation.identity import facts_of
from robust_accel.evaluation.ledger import refresh_report
from robust_accel.files import remove_incomplete
from robust_accel.models import PixelClassifier, save_model
from robust_accel.objectives import NOT_A_NUMBER
from robust_accel.optim import create_optimizer, make_scheduler
from robust_accel.processes import decided, owned
from robust_accel.provenance import check_equal_weights, versions
from robust_accel.recipe import Recipe
from robust_accel.reporting.report import write_report
from robust_accel.robust_model import RobustModel
from robust_accel.run_folder import RunFolder
from robust_accel.training.accelerator import (
    LATER,
    broadcast_all,
    create_accelerator,
    deterministic,
    share_buffers,
)
from robust_accel.training.averaging import make_average
from robust_accel.training.checkpoint import Checkpoint, Progress
from robust_accel.training.disk import check_output, check_room, told_when_full
from robust_accel.training.facts import doubts_of, facts_of_training, held_out_attack
from robust_accel.training.finite import Watch
from robust_accel.training.launcher import Sharding, read_launcher
from robust_accel.training.loop import Loop
from robust_accel.training.memory import Memory
from robust_accel.training.metrics import Averages, Metrics
from robust_accel.training.parts import batches, checked_data, classifier_for, in_precision, measure
from robust_accel.training.peers import joining, watched
from robust_accel.training.rollback import Collapse
from robust_accel.training.shards import Shards, check_recipe
from robust_accel.training.start import Start, engine_of, find_start
from robust_accel.training.stopping import Stop, Stopped, is_launched, refuse_restart
from robust_accel.training.takeover import take_over
from robust_accel.training.validation import Validation

logger = logging.getLogger(__name__)


def train(recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """Train by a recipe, measure, and leave a run folder.

    Args:
        recipe: From ``load_recipe``.
        resume: Continue the run that the folder holds; start it if there is none.

    Returns:
        How the weights were made, as in ``report.json``, and what ``evaluate`` has measured.

    Raises:
        ValueError: ``section.key: ...``, on all processes and before the first step: data, model,
            batch size or run folder are not as the recipe says, or another run owns the folder.
        FloatingPointError: Numbers are not finite: nothing of them is kept.
        Stopped: By a signal or ``train.max_time``: what was done is kept, ``resume`` goes on.
        Unavailable: Another process is gone or does not answer.
        Unwritable: The disk is full, or the run folder is gone; the last checkpoint is kept.
    """
    assert recipe.train is not None
    with Stop(recipe.train.max_time if is_main() else None) as stop:
        try:
            with deterministic(recipe.train.deterministic):
                return _train(recipe, stop, resume=resume)
        except Stopped as stopped:
            if is_main():
                kept = [str(path) for path in RunFolder(recipe.output).steps()[-1:]]
                where = f"{kept[0]} holds all that was done" if kept else "no step was done yet"
                command = f"robust-accel train {shlex.quote(str(recipe.output))}"
                if is_launched():  # by which it has its processes
                    command = "the same command with"
                logger.warning(
                    "stopped (%s): %s; %s --resume goes on", stopped.reason, where, command
                )
                stopped.is_told = True
            if stopped.request in (signal.SIGUSR1, signal.SIGALRM):
                refuse_restart()
            raise


def _train(recipe: Recipe, stop: Stop, *, resume: bool) -> dict[str, Any]:
    settings = recipe.train
    assert settings is not None
    folder = RunFolder(recipe.output)
    sharding = read_launcher()
    recipe, precision = in_precision(recipe)
    check_recipe(recipe, sharding, precision)
    with joining(settings.timeout):
        accelerator = create_accelerator(settings, precision, folder.path)
    with watched(settings.timeout, stop) as heartbeat, told_when_full(folder):
        decided(lambda: check_output(folder), accelerator)
        with owned(folder, accelerator):
            engine = engine_of(accelerator, sharding)
            # one that was started again goes on, with all that were not
            resume = any(gather_object([resume]))
            if resume:
                take_over(recipe, folder, engine, accelerator)
            start = decided(lambda: find_start(recipe, folder, engine, resume=resume), accelerator)
            data, about = checked_data(recipe, start, accelerator)
            torch.manual_seed(settings.seed)  # the same first weights on every process
            classifier = recipe.checked("model", lambda: classifier_for(recipe, data))
            about |= {"settings": recipe.settings, "engine": engine}
            common = (recipe, data, about, classifier, folder, accelerator)
            run = _Run(*common, stop, heartbeat, sharding, precision)
            run.open(start)
            run.fit()
            return run.finish()


class _Run:
    """One training run around its loop."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        about: dict[str, Any],
        classifier: PixelClassifier,
        folder: RunFolder,
        accelerator: Accelerator,
        stop: Stop,
        heartbeat: Heartbeat,
        sharding: Sharding | None,
        precision: str,
    ) -> None:
        settings = recipe.train
        assert settings is not None and recipe.optimizer is not None
        assert recipe.attack is not None
        self.recipe, self.settings, self.data, self.folder = recipe, settings, data, folder
        self.accelerator, self.stop, self.heartbeat = accelerator, stop, heartbeat
        self.batches = batches(recipe, data, accelerator.process_index, accelerator.num_processes)
        self.classifier = classifier.to(accelerator.device)
        if settings.channels_last:
            self.classifier.to(memory_format=torch.channels_last)
        if settings.compile:
            self.classifier.model.compile()  # the inner module: the wrapper's modes change
        sharded = sharding is not None
        self.average = make_average(settings, self.classifier, sharded=sharded)
        averaged = None if self.average is None else self.average.module
        self.shards: Shards | None = None
        if sharding is not None:
            whole = (self.classifier, averaged)
            self.shards = Shards(sharding, *whole, accelerator, precision, settings.keep_gathered)
        memory = Memory(recipe, data, self.batches, accelerator)
        robust_model = RobustModel(
            self.classifier,
            memory.attack_on(recipe.attack),
            memory.objective,
            attack_mode=settings.attack_mode,
            weight_perturbation=settings.awp,
        )
        optimizer = create_optimizer(self.classifier.model, recipe.optimizer)
        parts = (folder, classifier, optimizer, averaged, memory.num_bytes)
        tight = decided(lambda: check_room(*parts), accelerator)
        if tight is not None:
            logger.warning(tight)
        schedule = make_scheduler(
            optimizer,
            recipe.schedule,
            epochs=settings.epochs,
            steps_per_epoch=self.batches.steps_per_epoch,
        )
        model, optimizer = (self.shards or accelerator).prepare(robust_model, optimizer)
        if sharded or accelerator.distributed_type == DistributedType.DEEPSPEED:
            share_buffers(robust_model, accelerator)
        replicas = getattr(self.shards, "replicas", None)
        compression = compress_gradients(model, recipe.communication, group=replicas)
        self.progress = Progress()
        averages = Averages()
        self.watch = Watch(
            accelerator, settings, folder, self.progress, robust_model, optimizer, averaged
        )
        self.checkpoint = Checkpoint(
            folder,
            accelerator,
            self.progress,
            {"schedule": schedule, "compression": compression},
            averages,
            None if sharded else averaged,
            memory,
            self.watch.check,
            self.shards,
            keep=settings.keep,
            about=about | {"versions": versions()},
        )
        self.metrics = Metrics(
            folder,
            accelerator,
            self.progress,
            compression.meter,
            steps_per_epoch=self.batches.steps_per_epoch,
            trackers=bool(settings.log_with),
            gathered=compression.gathered if sharded else None,
        )
        self.loop = Loop(
            accelerator=accelerator,
            settings=settings,
            batches=self.batches,
            model=model,
            robust_model=robust_model,
            attack=recipe.attack,
            optimizer=optimizer,
            schedule=schedule,
            average=self.average,
            memory=memory,
            progress=self.progress,
            watch=self.watch,
            metrics=self.metrics,
            checkpoint=self.checkpoint,
            compression=compression,
            collective=recipe.communication,
            stop=stop,
            agreement=Agreement(settings.timeout + LATER),
            heartbeat=heartbeat,
            shards=self.shards,
            averages=averages,
        )
        weights = (self.classifier, averaged, self.shards)
        self.validation = Validation(recipe, data.validation, accelerator, *weights)
        done = (self.progress, self.checkpoint, schedule, optimizer)
        self.collapse = Collapse(recipe, data, folder, accelerator, *done)

    def open(self, start: Start) -> None:
        """Make or continue the run folder."""
        set_seed(self.settings.seed, device_specific=True)  # attacks differ between processes
        for note in start.notes:
            logger.info(note)
        if start.checkpoint is not None:
            self.checkpoint.load(start.checkpoint)
            self.watch.check(loaded=self.folder.checkpoints / start.checkpoint)
            logger.info("continuing %s at step %d", self.folder.path, self.progress.step)
        for doubt in doubts_of(self.recipe):
            logger.warning(doubt)
        if self.accelerator.is_main_process:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            remove_incomplete(self.folder.path)
            self.recipe.save(self.folder.recipe)
            self.folder.truncate_metrics(
                self.progress.step, validated=not self.progress.to_validate
            )
        self.accelerator.wait_for_everyone()
        if self.settings.log_with:
            self.accelerator.init_trackers(self.folder.path.name)

    def fit(self) -> None:
        """Train to the end, or until early stopping or ``max_steps``."""
        steps_per_epoch = self.batches.steps_per_epoch
        total = self.settings.epochs * steps_per_epoch
        if self.settings.max_steps is not None:
            total = min(total, self.settings.max_steps)
        progress = self.progress
        with self.metrics.bar(total):
            with self.stop.held():
                if self.collapse.take_up():
                    self.loop.save()
            if progress.to_validate:
                self.validate(-(-progress.step // steps_per_epoch))
            while progress.step < total and not progress.stopped_early:
                epoch = progress.step // steps_per_epoch
                last_step = min(total, (epoch + 1) * steps_per_epoch)
                with self.stop.held():
                    request = self.loop.epoch(epoch, last_step)
                    is_due = (epoch + 1) % self.settings.validate_every == 0
                    progress.to_validate = (
                        progress.step == last_step
                        and (is_due or last_step == total)
                        and len(self.data.validation) > 0
                    )
                    self.loop.save()  # a validation may be stopped at any moment
                    if request:
                        raise Stopped(request)
                    if not progress.to_validate:
                        self.collapse.look(epoch)
                if progress.to_validate:
                    self.validate(epoch + 1)
                self.metrics.show_step()
        self.loop.agreement.close()

    def validate(self, epoch: int) -> None:
        """Measure on the held-out split, keep the best weights, decide how the run goes on."""
        self.heartbeat.at("validation", self.progress.step)
        classifier, clean, line = self.validation.measure()
        if (clean.prediction == NOT_A_NUMBER).all():
            self.watch.stop(
                f"of {len(clean.index)} held-out images the model answers none with finite logits "
                f"at step {self.progress.step}"
            )
        with self.stop.held():
            self._keep_validation(epoch, line, classifier)

    def _keep_validation(
        self, epoch: int, line: dict[str, float], classifier: PixelClassifier
    ) -> None:
        self.metrics.write(line)
        robust, progress = line["validation_robust_accuracy"], self.progress
        clean = line["validation_clean_accuracy"]
        said = f"epoch {epoch}: held-out clean {100 * clean:.2f}%, robust {100 * robust:.2f}%"
        logger.info(said)
        if robust > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch = robust, epoch
            progress.validations_since_best = 0
            if self.accelerator.is_main_process:
                self.checkpoint.save_best(classifier)
        else:
            progress.validations_since_best += 1
            patience = self.settings.early_stopping
            progress.stopped_early = patience is not None and (
                progress.validations_since_best >= patience
            )
        progress.to_validate = False
        self.collapse.judge()
        self.collapse.look(epoch - 1)
        self.loop.save()

    def finish(self) -> dict[str, Any]:
        """Choose the weights, save them as a timm folder, measure them, write the report."""
        self.heartbeat.at("evaluation", self.progress.step)
        self.watch.check()
        classifier = self.validation.weights()
        check_equal_weights(classifier, self.accelerator)
        selection: dict[str, Any] = {"weights": self.settings.select}
        if self.settings.select == "best" and self.progress.best_epoch:
            decided(lambda: self.checkpoint.load_best(classifier), self.accelerator)
            broadcast_all(list(classifier.state_dict().values()))
            self.watch.check(loaded=self.folder.best)
            selection |= {
                "split": "held out of train",
                "n": len(self.data.validation),
                "metric": f"{held_out_attack(self.recipe)} accuracy",
                "robust_accuracy": self.progress.best_accuracy,
                "epoch": self.progress.best_epoch,
            }
        if self.accelerator.is_main_process:
            save_model(classifier, self.folder.model)
        metrics = decided(self.folder.read_metrics, self.accelerator)
        facts = {"selection": selection} | facts_of_training(
            self.recipe,
            self.data,
            self.progress,
            classifier,
            self.accelerator,
            metrics,
            steps_per_epoch=self.batches.steps_per_epoch,
        )
        result = measure(self.recipe, self.data, classifier, self.folder, self.accelerator)
        if self.accelerator.is_main_process:
            about = facts_of(classifier, self.folder.path.name)
            refresh_report(
                self.folder, model={"function": result["function"], **about}, facts=facts
            )
            write_report(self.folder)
        self.loop.compression.close()
        self.accelerator.end_training()
        return facts | result
