"""A training run: what is prepared once, validation, and what it leaves. The step: ``loop.py``."""

import os
import signal
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from timm.utils import ModelEmaV3
from tqdm.auto import tqdm

from robust_accel.comm import compress_gradients
from robust_accel.comm.agreement import Agreement
from robust_accel.comm.heartbeat import Heartbeat
from robust_accel.data import Data, load_data
from robust_accel.evaluation import evaluate, under_attack
from robust_accel.evaluation.autoattack import AutoAttackEvaluation
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.identity import facts_of
from robust_accel.evaluation.ledger import refresh_report
from robust_accel.models import PixelClassifier, save_model
from robust_accel.optim import create_optimizer, make_scheduler
from robust_accel.provenance import digest_of_parameters, versions
from robust_accel.recipe import Recipe
from robust_accel.reporting.report import write_report
from robust_accel.robust_model import RobustModel
from robust_accel.run_folder import RunFolder
from robust_accel.training.accelerator import (
    LATER,
    choose_precision,
    create_accelerator,
    share_buffers,
)
from robust_accel.training.checkpoint import (
    Checkpoint,
    DataIdentity,
    Progress,
    check_same_data,
    load_weights,
    save_weights,
)
from robust_accel.training.disk import check_room, check_writable, told_when_full
from robust_accel.training.loop import Loop
from robust_accel.training.metrics import Metrics, peak_memory
from robust_accel.training.parts import batches, check_labels, classifier_for
from robust_accel.training.peers import joining, watched
from robust_accel.training.stopping import Stop, Stopped, refuse_restart


def train(recipe: Recipe, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train by a recipe, measure, and leave a run folder.

    Args:
        recipe: From ``load_recipe``.
        resume: Continue the run that the folder holds; start it if there is none.
        quiet: Lines instead of a progress bar.

    Returns:
        How the weights were made, as in ``report.json``, and what ``evaluate`` has measured.

    Raises:
        ValueError: ``section.key: ...``, before any process group starts: data, model, batch size
            or run folder are not as the recipe says.
        Stopped: By a signal or ``train.max_time``: what was done is kept, ``resume`` goes on.
        Unavailable: Another process is gone or does not answer.
        Unwritable: The disk is full, or the run folder is gone; the last checkpoint is kept.
    """
    assert recipe.train is not None
    is_main = os.environ.get("RANK", "0") == "0"
    with Stop(recipe.train.max_time if is_main else None) as stop:
        try:
            return _train(recipe, stop, resume=resume, quiet=quiet)
        except Stopped as stopped:
            if is_main:
                kept = [str(path) for path in RunFolder(recipe.output).steps()[-1:]]
                where = f"{kept[0]} holds all that was done" if kept else "no step was done yet"
                tqdm.write(f"stopped ({stopped.reason}): {where}; --resume goes on")
            if stopped.request in (signal.SIGUSR1, signal.SIGALRM):
                refuse_restart()
            raise


def _train(recipe: Recipe, stop: Stop, *, resume: bool, quiet: bool) -> dict[str, Any]:
    settings = recipe.train
    assert settings is not None and recipe.optimizer is not None and recipe.attack is not None
    folder = RunFolder(recipe.output)
    check_writable(folder.path)
    continued = folder.check(recipe.settings, resume=resume)
    data = recipe.checked(
        "data", lambda: load_data(recipe.data, seed=settings.seed, ids=recipe.evaluate.ids)
    )
    identity = data.identity()
    if continued:
        recipe.checked("data", lambda: check_same_data(folder, identity))
    torch.manual_seed(settings.seed)  # the same first weights on every process
    classifier = recipe.checked("model", lambda: classifier_for(recipe, data))
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe.checked("train", lambda: batches(recipe, data, 0, num_processes))
    recipe.checked("data", lambda: check_labels(recipe, data))
    optimizer = create_optimizer(classifier.model, recipe.optimizer)
    tight = check_room(folder, classifier, optimizer, settings.ema_decay is not None)
    precision = recipe.checked("train", lambda: choose_precision(settings.precision))
    if recipe.evaluate.autoattack is not None:  # what it refuses, it refuses before training
        AutoAttackEvaluation(recipe.evaluate, data.num_classes)

    micro_batch_size = settings.batch_size // (settings.gradient_accumulation * num_processes)
    with joining(settings.timeout):
        accelerator = create_accelerator(settings, precision, micro_batch_size, folder.path)
    with watched(settings.timeout, stop) as heartbeat, told_when_full(folder):
        common = (recipe, data, identity, classifier, folder, accelerator)
        run = _Run(*common, stop, heartbeat, quiet=quiet)
        if tight is not None:
            run.say(tight)
        run.open(continued)
        run.fit()
        return run.finish()


class _Run:
    """One training run around its loop."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        identity: DataIdentity,
        classifier: PixelClassifier,
        folder: RunFolder,
        accelerator: Accelerator,
        stop: Stop,
        heartbeat: Heartbeat,
        *,
        quiet: bool,
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
        robust_model = RobustModel(
            self.classifier,
            recipe.attack,
            recipe.objective,
            attack_mode=settings.attack_mode,
            weight_perturbation=settings.awp,
        )
        optimizer = create_optimizer(self.classifier.model, recipe.optimizer)
        schedule = make_scheduler(
            optimizer,
            recipe.schedule,
            epochs=settings.epochs,
            steps_per_epoch=self.batches.steps_per_epoch,
        )
        self.ema = None
        if settings.ema_decay is not None:
            self.ema = ModelEmaV3(self.classifier, decay=settings.ema_decay, use_warmup=True)
        model, optimizer = accelerator.prepare(robust_model, optimizer)
        share_buffers(robust_model, accelerator)
        compression = compress_gradients(model, recipe.communication)
        self.progress = Progress()
        self.checkpoint = Checkpoint(
            folder,
            accelerator,
            self.progress,
            {"schedule": schedule, "compression": compression},
            None if self.ema is None else self.ema.module,
            identity,
        )
        self.metrics = Metrics(
            folder,
            accelerator,
            self.progress,
            compression.meter,
            steps_per_epoch=self.batches.steps_per_epoch,
            trackers=bool(settings.log_with),
            quiet=quiet,
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
            ema=self.ema,
            progress=self.progress,
            metrics=self.metrics,
            checkpoint=self.checkpoint,
            compression=compression,
            collective=recipe.communication,
            stop=stop,
            agreement=Agreement(settings.timeout + LATER),
            heartbeat=heartbeat,
        )

    def open(self, continued: bool) -> None:
        """Make or continue the run folder."""
        set_seed(self.settings.seed, device_specific=True)  # attacks differ between processes
        if continued:
            num_processes = self.checkpoint.load()
            self.say(f"continuing {self.folder.path} at step {self.progress.step}")
            if num_processes != self.accelerator.num_processes:
                self.say(
                    f"the checkpoint is from {num_processes} processes, not "
                    f"{self.accelerator.num_processes}: the run goes on, but not bit for bit"
                )
        for doubt in self.recipe.doubts:
            self.say(doubt)
        if self.accelerator.is_main_process:
            self.folder.path.mkdir(parents=True, exist_ok=True)
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
            if progress.to_validate:
                self.validate(-(-progress.step // steps_per_epoch))
            while progress.step < total and not progress.stopped_early:
                epoch = progress.step // steps_per_epoch
                last_step = min(total, (epoch + 1) * steps_per_epoch)
                with self.stop.held():
                    request = self.loop.epoch(epoch, last_step)
                    is_over = progress.step == last_step
                    every = self.settings.validate_every
                    progress.to_validate = (
                        is_over and (epoch + 1) % every == 0 and len(self.data.validation) > 0
                    )
                    self.loop.save()  # a validation may be stopped at any moment
                    if request:
                        raise Stopped(request)
                if progress.to_validate:
                    self.validate(epoch + 1)
        self.loop.agreement.close()

    def validate(self, epoch: int) -> None:
        """Measure on the held-out split, keep the best weights, decide on early stopping."""
        self.heartbeat.at("validation", self.progress.step)
        classifier, settings = self._weights_to_measure(), self.recipe.evaluate
        bench = Bench(
            classifier,
            self.data.validation,
            self.accelerator,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        clean = bench.clean()
        pgd = under_attack(settings.make_pgd(self.settings.validation_steps))
        line = {
            "validation_clean_accuracy": clean.accuracy,
            "validation_robust_accuracy": bench.attacked(pgd, clean).accuracy,
        }
        with self.stop.held():
            self._keep_validation(epoch, line, classifier)

    def _keep_validation(
        self, epoch: int, line: dict[str, float], classifier: PixelClassifier
    ) -> None:
        self.metrics.write(line)
        robust, progress = line["validation_robust_accuracy"], self.progress
        self.say(
            f"epoch {epoch}: held-out clean {100 * line['validation_clean_accuracy']:.2f}%, "
            f"robust {100 * robust:.2f}%"
        )
        if robust > progress.best_accuracy:
            progress.best_accuracy, progress.best_epoch = robust, epoch
            progress.validations_since_best = 0
            if self.accelerator.is_main_process:
                save_weights(classifier, self.folder.best)
        else:
            progress.validations_since_best += 1
            patience = self.settings.early_stopping
            progress.stopped_early = patience is not None and (
                progress.validations_since_best >= patience
            )
        progress.to_validate = False
        self.loop.save()

    def finish(self) -> dict[str, Any]:
        """Choose the weights, save them as a timm folder, measure them, write the report."""
        self.heartbeat.at("evaluation", self.progress.step)
        classifier = self._weights_to_measure()
        selection: dict[str, Any] = {"weights": self.settings.select}
        if self.settings.select == "best" and self.folder.best.exists():
            load_weights(classifier, self.folder.best)
            selection |= {
                "split": "held out of train",
                "n": len(self.data.validation),
                "metric": f"PGD-{self.settings.validation_steps} accuracy",
                "robust_accuracy": self.progress.best_accuracy,
                "epoch": self.progress.best_epoch,
            }
        if self.accelerator.is_main_process:
            save_model(classifier, self.folder.model)
        facts = self._facts(classifier) | {"selection": selection, **self._best_against_last()}
        result = evaluate(
            classifier,
            self.data.test,
            self.recipe.evaluate,
            self.accelerator,
            num_classes=self.data.num_classes,
            folder=self.folder,
            train=self.data.train,
            class_names=self.data.class_names,
            source=self.recipe.data.source(),
            train_source=self.recipe.data.source("train"),
            kind=self.data.selection,
            say=self.say,
        )
        if self.accelerator.is_main_process:
            about = facts_of(classifier, self.folder.path.name)
            refresh_report(
                self.folder, model={"function": result["function"], **about}, facts=facts
            )
            write_report(self.folder)
        self.loop.compression.close()
        self.accelerator.end_training()
        return facts | result

    def say(self, text: str) -> None:
        """Tell the user, from one process, without breaking the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def _facts(self, classifier: PixelClassifier) -> dict[str, Any]:
        """What the report says about how the weights were made."""
        progress, steps = self.progress, max(1, self.progress.step)
        epochs = steps / self.batches.steps_per_epoch
        digest, equal = digest_of_parameters(classifier, self.accelerator)
        return {
            "recipe": self.recipe.settings,
            "doubts": self.recipe.doubts,
            "steps": progress.step,
            "epochs": epochs,
            "stopped_early": progress.stopped_early,
            "num_processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "precision": self.accelerator.mixed_precision,
            "attack_batchnorm_mode": self.settings.attack_mode,
            "normalization": {
                "where": "inside the model",
                "mean": self.classifier.mean.flatten().tolist(),
                "std": self.classifier.std.flatten().tolist(),
            },
            "ema_decay": self.settings.ema_decay,
            "applied": self.loop.applied,
            "parameters_digest": digest,
            "parameters_equal_on_all_processes": equal,
            "train_seconds_per_epoch": progress.train_seconds / epochs,
            "comm_seconds_per_epoch": progress.comm_seconds / epochs,
            "comm_exposed_seconds_per_epoch": progress.comm_exposed_seconds / epochs,
            "bytes_sent_per_step": progress.bytes_sent / steps,
            "peak_memory_bytes": peak_memory(self.accelerator.device),
            "versions": versions(),
        }

    def _best_against_last(self) -> dict[str, Any]:
        """Robust accuracy on the held-out split: of the best epoch, and of the last."""
        lines = [m for m in self.folder.read_metrics() if "validation_robust_accuracy" in m]
        if not lines:
            return {}
        about = {
            "split": "held out of train",
            "n": len(self.data.validation),
            "attack": f"PGD-{self.settings.validation_steps}",
            "best": self.progress.best_accuracy,
            "best_epoch": self.progress.best_epoch,
            "last": lines[-1]["validation_robust_accuracy"],
        }
        return {"best_against_last": about}

    def _weights_to_measure(self) -> PixelClassifier:
        """The averaged weights if there are any, with one process's BatchNorm statistics."""
        classifier = self.classifier if self.ema is None else self.ema.module
        # each process updates its own statistics; the first one's count, as in DDP's forward
        for buffer in classifier.buffers():
            buffer.copy_(broadcast(buffer.clone()))
        return classifier
