"""A training run: what is prepared once, validation, and what it leaves. The step: ``loop.py``."""

import os
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from tqdm.auto import tqdm

from robust_accel.comm import compress_gradients
from robust_accel.data import Data, TrainingBatches, load_data
from robust_accel.evaluation import evaluate, under_attack
from robust_accel.evaluation.autoattack import AutoAttackEvaluation
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.identity import facts_of
from robust_accel.evaluation.ledger import refresh_report
from robust_accel.files import remove_incomplete
from robust_accel.models import PixelClassifier, check_fits, create_classifier, save_model
from robust_accel.objectives import NOT_A_NUMBER
from robust_accel.optim import create_optimizer, make_scheduler
from robust_accel.processes import decided, owned
from robust_accel.provenance import check_equal_weights, digest_of_parameters, versions
from robust_accel.recipe import Recipe
from robust_accel.reporting.report import write_report
from robust_accel.robust_model import RobustModel
from robust_accel.run_folder import RunFolder
from robust_accel.training.accelerator import (
    broadcast_all,
    choose_precision,
    create_accelerator,
    share_buffers,
)
from robust_accel.training.checkpoint import Checkpoint, Progress
from robust_accel.training.collapse import Fall, falls
from robust_accel.training.finite import Watch
from robust_accel.training.loop import Loop
from robust_accel.training.metrics import Averages, Metrics, peak_memory
from robust_accel.training.start import Start, check_same_data, engine_of, find_start


def train(recipe: Recipe, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train by a recipe, measure, and leave a run folder.

    Args:
        recipe: From ``load_recipe``.
        resume: Continue the run that the folder holds; start it if there is none.
        quiet: Lines instead of a progress bar.

    Returns:
        How the weights were made, as in ``report.json``, and what ``evaluate`` has measured.

    Raises:
        ValueError: ``section.key: ...``, on all processes and before the first step: data, model,
            batch size or run folder are not as the recipe says, or another run owns the folder.
    """
    settings = recipe.train
    assert settings is not None and recipe.optimizer is not None and recipe.attack is not None
    folder = RunFolder(recipe.output)
    folder.check_contained()
    precision = recipe.checked("train", lambda: choose_precision(settings.precision))
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro_batch_size = settings.batch_size // (settings.gradient_accumulation * num_processes)
    accelerator = create_accelerator(settings, precision, micro_batch_size, folder.path)
    with owned(folder, accelerator, lambda text: _say(text, accelerator)):
        engine = engine_of(accelerator)
        start = decided(lambda: find_start(recipe, folder, engine, resume=resume), accelerator)
        run = _prepared(recipe, folder, accelerator, start, engine, quiet=quiet)
        run.open(start)
        run.fit()
        return run.finish()


def _prepared(
    recipe: Recipe,
    folder: RunFolder,
    accelerator: Accelerator,
    start: Start,
    engine: dict[str, Any],
    *,
    quiet: bool,
) -> "_Run":
    """Everything that a run needs, or what is wrong with it, before anything is written."""
    settings = recipe.train
    assert settings is not None
    data = recipe.checked(
        "data",
        lambda: load_data(
            recipe.data,
            seed=settings.seed,
            ids=recipe.evaluate.ids,
            num_classes=recipe.model.num_classes,
        ),
    )
    identity = data.identity()
    recipe.checked("data", lambda: check_same_data(start, identity, len(data.test)))
    torch.manual_seed(settings.seed)  # the same first weights on every process
    classifier = recipe.checked("model", lambda: _classifier_for(recipe, data))
    recipe.checked("train", lambda: _batches(recipe, data, 0, accelerator.num_processes))
    recipe.checked("data", lambda: _check_labels(recipe, data))
    if recipe.evaluate.autoattack is not None:  # what it refuses, it refuses before training
        AutoAttackEvaluation(recipe.evaluate, data.num_classes)
    about = {"settings": recipe.settings, "data": identity, "engine": engine}
    return _Run(recipe, data, about, classifier, folder, accelerator, quiet=quiet)


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
        *,
        quiet: bool,
    ) -> None:
        settings = recipe.train
        assert settings is not None and recipe.optimizer is not None
        assert recipe.attack is not None
        self.recipe, self.settings, self.data, self.folder = recipe, settings, data, folder
        self.accelerator = accelerator
        self.batches = _batches(recipe, data, accelerator.process_index, accelerator.num_processes)
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
        averages = Averages()
        averaged = None if self.ema is None else self.ema.module
        self.watch = Watch(
            accelerator, settings, folder, self.progress, robust_model, optimizer, averaged
        )
        self.checkpoint = Checkpoint(
            folder,
            accelerator,
            self.progress,
            {"schedule": schedule, "compression": compression},
            averages,
            averaged,
            self.watch.check,
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
            watch=self.watch,
            metrics=self.metrics,
            checkpoint=self.checkpoint,
            compression=compression,
            collective=recipe.communication,
            averages=averages,
        )

    def open(self, start: Start) -> None:
        """Make or continue the run folder."""
        set_seed(self.settings.seed, device_specific=True)  # attacks differ between processes
        for note in start.notes:
            self.say(note)
        if start.checkpoint is not None:
            self.checkpoint.load(start.checkpoint)
            self.watch.check(loaded=self.folder.checkpoints / start.checkpoint)
            self.say(f"continuing {self.folder.path} at step {self.progress.step}")
        for doubt in self.recipe.doubts:
            self.say(doubt)
        if self.accelerator.is_main_process:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            remove_incomplete(self.folder.path)
            self.recipe.save(self.folder.recipe)
            self.folder.truncate_metrics(self.progress.step)
        self.accelerator.wait_for_everyone()
        if self.settings.log_with:
            self.accelerator.init_trackers(self.folder.path.name)

    def fit(self) -> None:
        """Train to the end, or until early stopping or ``max_steps``."""
        steps_per_epoch = self.batches.steps_per_epoch
        total = self.settings.epochs * steps_per_epoch
        if self.settings.max_steps is not None:
            total = min(total, self.settings.max_steps)
        with self.metrics.bar(total):
            while self.progress.step < total and not self.progress.stopped_early:
                epoch = self.progress.step // steps_per_epoch
                self.loop.epoch(epoch, last_step=min(total, (epoch + 1) * steps_per_epoch))
                self.validate(epoch + 1)
                for fall in self._falls():
                    if fall.epoch > epoch:  # the others were told
                        self.say(fall.text)
                self.checkpoint.save()

    def validate(self, epoch: int) -> None:
        """Measure on the held-out split, keep the best weights, decide on early stopping."""
        if epoch % self.settings.validate_every or len(self.data.validation) == 0:
            return
        self.watch.check()
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
        self.metrics.write(line)
        if (clean.prediction == NOT_A_NUMBER).all():
            self.watch.stop(
                f"of {len(clean.index)} held-out images the model answers none with finite logits "
                f"at step {self.progress.step}"
            )
        robust, progress = line["validation_robust_accuracy"], self.progress
        self.say(
            f"epoch {epoch}: held-out clean {100 * line['validation_clean_accuracy']:.2f}%, "
            f"robust {100 * robust:.2f}%"
        )
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

    def finish(self) -> dict[str, Any]:
        """Choose the weights, save them as a timm folder, measure them, write the report."""
        self.watch.check()
        classifier = self._weights_to_measure()
        check_equal_weights(classifier, self.accelerator)
        selection: dict[str, Any] = {"weights": self.settings.select}
        if self.settings.select == "best" and self.progress.best_epoch:
            decided(lambda: self.checkpoint.load_best(classifier), self.accelerator)
            broadcast_all(list(classifier.state_dict().values()))
            self.watch.check(loaded=self.folder.best)
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
        _say(text, self.accelerator)

    def _facts(self, classifier: PixelClassifier) -> dict[str, Any]:
        """What the report says about how the weights were made."""
        progress, steps = self.progress, max(1, self.progress.step)
        epochs = steps / self.batches.steps_per_epoch
        digest, _ = digest_of_parameters(classifier, self.accelerator)
        return {
            "recipe": self.recipe.settings,
            "left_out": {name: asdict(found) for name, found in self.data.left_out.items()},
            "doubts": [*self.recipe.doubts, *(fall.text for fall in self._falls())],
            "steps": progress.step,
            "epochs": epochs,
            "stopped_early": progress.stopped_early,
            "skipped_steps": progress.skipped_steps,
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
            "applied": self.progress.applied,
            "parameters_digest": digest,
            "train_seconds_per_epoch": progress.train_seconds / epochs,
            "comm_seconds_per_epoch": progress.comm_seconds / epochs,
            "comm_exposed_seconds_per_epoch": progress.comm_exposed_seconds / epochs,
            "bytes_sent_per_step": progress.bytes_sent / steps,
            "peak_memory_bytes": peak_memory(self.accelerator.device),
            "versions": versions(),
        }

    def _falls(self) -> list[Fall]:
        settings = self.settings
        return falls(
            self.folder.read_metrics(),
            self.data.num_classes,
            held_out=len(self.data.validation),
            batch=settings.log_every * settings.batch_size,
            after=settings.eps_warmup_epochs,
        )

    def _best_against_last(self) -> dict[str, Any]:
        """Robust accuracy on the held-out split: of the best epoch, and of the last."""
        metrics = decided(self.folder.read_metrics, self.accelerator)
        lines = [m for m in metrics if "validation_robust_accuracy" in m]
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
        broadcast_all(list(classifier.buffers()))
        return classifier


def _say(text: str, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        tqdm.write(text)


def _batches(recipe: Recipe, data: Data, rank: int, world_size: int) -> TrainingBatches:
    assert recipe.train is not None
    unlabeled = recipe.data.unlabeled
    return TrainingBatches(
        data,
        fraction=None if unlabeled is None else unlabeled.fraction,
        batch_size=recipe.train.batch_size,
        num_micro=recipe.train.gradient_accumulation,
        rank=rank,
        world_size=world_size,
        seed=recipe.train.seed,
        sharding=recipe.data.sharding,
    )


def _check_labels(recipe: Recipe, data: Data) -> None:
    if not data.all_labeled and not getattr(recipe.objective, "takes_unlabeled", False):
        raise ValueError(
            f"unlabeled: these images have no labels, and the objective "
            f"{recipe.settings['objective']['name']} needs them: label them by the pseudo-label "
            "command, or choose trades"
        )


def _classifier_for(recipe: Recipe, data: Data) -> PixelClassifier:
    classifier = create_classifier(
        recipe.model, num_classes=data.num_classes, in_chans=data.shape[0]
    )
    check_fits(classifier, data.train, data.num_classes)
    classifier.class_names = data.class_names
    return classifier
