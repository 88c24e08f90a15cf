"""The training loop: Algorithm A1 on Accelerate. The step itself is marked below."""

import math
import os
import resource
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, reduce, set_seed
from timm.utils import ModelEmaV3
from torch import Tensor
from tqdm.auto import tqdm

from robust_accel.attacks import Attack
from robust_accel.comm import GradientCompression, compress_gradients
from robust_accel.data import NO_LABEL, Data, TrainingBatches, load_data
from robust_accel.evaluation import accuracy, clean, correct_flags, evaluate, under_attack
from robust_accel.evaluation.autoattack import AutoAttackEvaluation
from robust_accel.models import PixelClassifier, check_fits, create_classifier, save_model
from robust_accel.optim import create_optimizer, make_scheduler
from robust_accel.provenance import digest_of_parameters, versions
from robust_accel.recipe import Recipe
from robust_accel.reporting.report import write_report
from robust_accel.robust_model import RobustModel
from robust_accel.run_folder import RunFolder, append_line
from robust_accel.training.accelerator import create_accelerator, share_buffers
from robust_accel.training.checkpoint import Checkpoint, Progress, load_weights, save_weights


def train(recipe: Recipe, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train by a recipe, measure, and leave a run folder.

    Args:
        recipe: From ``load_recipe``.
        resume: Continue the run that the folder holds; start it if there is none.
        quiet: Lines instead of a progress bar.

    Returns:
        The report, as in ``report.json``.

    Raises:
        ValueError: ``section.key: ...``, before any process group starts: data, model, batch size
            or run folder are not as the recipe says.
    """
    settings = recipe.train
    assert settings is not None and recipe.optimizer is not None and recipe.attack is not None
    folder = RunFolder(recipe.output)
    continued = folder.check(recipe.settings, resume=resume)
    data = recipe.checked("data", lambda: load_data(recipe.data, seed=settings.seed))
    torch.manual_seed(settings.seed)  # the same first weights on every process
    classifier = recipe.checked("model", lambda: _classifier_for(recipe, data))
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    recipe.checked("train", lambda: _batches(recipe, data, 0, num_processes))
    recipe.checked("data", lambda: _check_labels(recipe, data))
    precision = recipe.checked("train", lambda: choose_precision(settings.precision))
    if recipe.evaluate.autoattack is not None:  # what it refuses, it refuses before training
        AutoAttackEvaluation(recipe.evaluate, data.num_classes)

    micro_batch_size = settings.batch_size // (settings.gradient_accumulation * num_processes)
    accelerator = create_accelerator(settings, precision, micro_batch_size, folder.path)
    run = _Run(recipe, data, classifier, folder, accelerator, quiet=quiet)
    run.open(continued)
    run.fit()
    return run.finish()


class _Run:
    """One training run: what is prepared once, and the loop over it."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        classifier: PixelClassifier,
        folder: RunFolder,
        accelerator: Accelerator,
        *,
        quiet: bool,
    ) -> None:
        assert recipe.train is not None and recipe.optimizer is not None
        assert recipe.attack is not None
        self.recipe, self.settings, self.data, self.folder = recipe, recipe.train, data, folder
        self.accelerator, self.quiet = accelerator, quiet
        self.batches = _batches(recipe, data, accelerator.process_index, accelerator.num_processes)
        self.classifier = classifier.to(accelerator.device)
        if self.settings.channels_last:
            self.classifier.to(memory_format=torch.channels_last)
        if self.settings.compile:
            self.classifier.model.compile()  # the inner module: the wrapper's modes change
        self.robust_model = RobustModel(
            self.classifier,
            recipe.attack,
            recipe.objective,
            attack_mode=self.settings.attack_mode,
            weight_perturbation=self.settings.awp,
        )
        optimizer = create_optimizer(self.classifier.model, recipe.optimizer)
        self.schedule = make_scheduler(
            optimizer,
            recipe.schedule,
            epochs=self.settings.epochs,
            steps_per_epoch=self.batches.steps_per_epoch,
        )
        self.ema = None
        if self.settings.ema_decay is not None:
            self.ema = ModelEmaV3(self.classifier, decay=self.settings.ema_decay, use_warmup=True)
        self.model, self.optimizer = accelerator.prepare(self.robust_model, optimizer)
        share_buffers(self.robust_model, accelerator)
        self.compression: GradientCompression = compress_gradients(self.model, recipe.communication)
        self.progress = Progress()
        self.checkpoint = Checkpoint(
            folder,
            accelerator,
            self.progress,
            {"schedule": self.schedule, "compression": self.compression},
            None if self.ema is None else self.ema.module,
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
        if self.accelerator.is_main_process:
            self.folder.path.mkdir(parents=True, exist_ok=True)
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
        self.bar = tqdm(
            total=total,
            initial=self.progress.step,
            desc=self.folder.path.name,
            unit="step",
            disable=self.quiet or not self.accelerator.is_main_process,
        )
        with self.bar:
            while self.progress.step < total and not self.progress.stopped_early:
                epoch = self.progress.step // steps_per_epoch
                self.train_epoch(epoch, last_step=min(total, (epoch + 1) * steps_per_epoch))
                self.validate(epoch + 1)
                self.checkpoint.save()

    def train_epoch(self, epoch: int, last_step: int) -> None:
        """Train from where the run stands to the epoch's end."""
        settings, progress, device = self.settings, self.progress, self.accelerator.device
        first_step = progress.step % self.batches.steps_per_epoch
        averages = _Averages()
        self._start_clock()
        self.model.train()
        self.robust_model.attack = self._attack_in(epoch)
        if settings.awp is not None:
            self.robust_model.perturb_weights = epoch >= settings.awp.warmup_epochs
        for x, labels in self.batches.epoch(epoch, first_step, device):
            if settings.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)

            # ---- the training step: attack and outer loss are in the model's forward ----------
            with self.accelerator.accumulate(self.model):
                out = self.model(x, labels)
                self.accelerator.backward(out["loss"])
                if settings.max_grad_norm is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(
                        self.model.parameters(), settings.max_grad_norm
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
            # ------------------------------------------------------------------------------------

            averages.add(out, labels)
            if not self.accelerator.sync_gradients:
                continue
            self.schedule.step()
            if self.ema is not None:
                self.ema.update(self.classifier)
            progress.step += 1
            self.bar.update()
            if progress.step % settings.log_every == 0 or progress.step == last_step:
                self.log(averages, x, labels)
                averages = _Averages()
            if progress.step == last_step:
                break
            if settings.checkpoint_every and progress.step % settings.checkpoint_every == 0:
                self._stop_clock()
                self.checkpoint.save()
                self._start_clock()
        self._stop_clock()

    def _attack_in(self, epoch: int) -> Attack:
        """The recipe's attack, weaker in its warm-up."""
        attack: Any = self.recipe.attack
        share = (epoch + 1) / max(1, self.settings.eps_warmup_epochs)
        if share >= 1:
            return attack
        sizes = {key: getattr(attack, key, None) for key in ("eps", "step_size")}
        return attack.model_copy(update={k: share * v for k, v in sizes.items() if v is not None})

    def log(self, averages: "_Averages", x: Tensor, labels: Tensor) -> None:
        """Write one line of metrics; stop at once when the loss is no number any more."""
        images = averages.count * len(labels) * self.accelerator.num_processes
        seconds = averages.seconds()
        predicted = self.robust_model.predict(x)
        averages.values["clean_batch_accuracy"] = _share_right(predicted, labels)
        # averaged over the processes; the clean accuracy is the last batch's alone
        line = {name: reduce(value, "mean").item() for name, value in averages.means().items()}
        line |= {
            "images_per_second": images / seconds,
            **self._communication_so_far(),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self.bar.set_postfix(
            loss=f"{line['loss']:.3f}",
            clean=f"{100 * line['clean_batch_accuracy']:.1f}%",
            robust=f"{100 * line['robust_batch_accuracy']:.1f}%",
            images_s=f"{line['images_per_second']:.0f}",
            sent=f"{line['bytes_sent'] / 2**20:.1f}MiB",
            waited=f"{line['comm_exposed_seconds']:.0f}s",
        )
        self._write(line)
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(
                f"the loss is {line['loss']} at step {self.progress.step}; the last checkpoint is "
                f"{[str(path) for path in self.folder.steps()[-1:]]}"
            )

    def validate(self, epoch: int) -> None:
        """Measure on the held-out split, keep the best weights, decide on early stopping."""
        if epoch % self.settings.validate_every or len(self.data.validation) == 0:
            return
        pgd = self.recipe.evaluate.make_pgd(self.settings.validation_steps)
        classifier = self._weights_to_measure()
        line = {
            f"validation_{name}_accuracy": accuracy(
                correct_flags(
                    classifier,
                    self.data.validation,
                    perturb,
                    self.recipe.evaluate,
                    self.accelerator,
                )
            )["accuracy"]
            for name, perturb in (("clean", clean), ("robust", under_attack(pgd)))
        }
        self._write(line)
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

    def finish(self) -> dict[str, Any]:
        """Choose the weights, save them as a timm folder, measure them, write the report."""
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
        report = self._facts(classifier) | {"selection": selection}
        report |= evaluate(
            classifier,
            self.data.test,
            self.recipe.evaluate,
            self.accelerator,
            num_classes=self.data.num_classes,
            folder=self.folder,
            say=self.say,
        )
        if self.accelerator.is_main_process:
            self.folder.write_report(report)
            append_line(self.folder.evaluations, report)
            write_report(self.folder)
        self.accelerator.end_training()
        return report

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
            "parameters_digest": digest,
            "parameters_equal_on_all_processes": equal,
            "train_seconds_per_epoch": progress.train_seconds / epochs,
            "comm_seconds_per_epoch": progress.comm_seconds / epochs,
            "comm_exposed_seconds_per_epoch": progress.comm_exposed_seconds / epochs,
            "bytes_sent_per_step": progress.bytes_sent / steps,
            "peak_memory_bytes": _peak_memory(self.accelerator.device),
            "versions": versions(),
        }

    def _weights_to_measure(self) -> PixelClassifier:
        """The averaged weights if there are any, with one process's BatchNorm statistics."""
        classifier = self.classifier if self.ema is None else self.ema.module
        # each process updates its own statistics; the first one's count, as in DDP's forward
        for buffer in classifier.buffers():
            buffer.copy_(broadcast(buffer.clone()))
        return classifier

    def _write(self, line: dict[str, Any]) -> None:
        """One line to ``metrics.jsonl`` and to the trackers."""
        step = self.progress.step
        epoch = step / self.batches.steps_per_epoch
        if self.accelerator.is_main_process:
            append_line(self.folder.metrics, {"step": step, "epoch": epoch} | line)
            if self.quiet:
                print(f"step {step} " + " ".join(f"{k}={v:.5g}" for k, v in line.items()))
        if self.settings.log_with:
            self.accelerator.log(line, step=step)

    def _start_clock(self) -> None:
        self._started = time.perf_counter()
        self._meter_at_start = self._meter()

    def _stop_clock(self) -> None:
        self.progress.train_seconds += time.perf_counter() - self._started
        for name, value in self._communication_so_far().items():
            setattr(self.progress, name, value)

    def _meter(self) -> dict[str, float]:
        meter = self.compression.meter
        return {
            "bytes_sent": meter.bytes_sent,
            "comm_seconds": meter.seconds,
            "comm_exposed_seconds": meter.exposed_seconds,
        }

    def _communication_so_far(self) -> dict[str, float]:
        """What training has cost this rank, earlier parts of a continued run included."""
        return {
            name: getattr(self.progress, name) + value - self._meter_at_start[name]
            for name, value in self._meter().items()
        }


class _Averages:
    """Means of the step's numbers since the last line, kept on the device."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self.count = 0
        self._started = time.perf_counter()

    def add(self, out: dict[str, Tensor], labels: Tensor) -> None:
        right = _share_right(out["logits"].detach().argmax(dim=1), labels)
        scalars = {k: v.detach().float() for k, v in out.items() if v.ndim == 0}
        for name, value in (scalars | {"robust_batch_accuracy": right}).items():
            self._sums[name] = self._sums[name] + value if self.count else value
        self.count += 1

    def means(self) -> dict[str, Tensor]:
        return {name: total / self.count for name, total in self._sums.items()} | self.values

    def seconds(self) -> float:
        return time.perf_counter() - self._started


def _share_right(predictions: Tensor, labels: Tensor) -> Tensor:
    """Accuracy on the images that have a label."""
    labeled = labels != NO_LABEL
    return (predictions == labels).sum() / labeled.sum().clamp(min=1)


def choose_precision(precision: str) -> str:
    """Accelerate's ``mixed_precision``: ``auto`` is bf16 where the device computes in it."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision: fp16 needs a GPU, found none; allowed: auto, fp32, bf16")
    if precision == "auto":
        if torch.cuda.is_available():
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
            native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
        precision = "bf16" if native else "fp32"
    return "no" if precision == "fp32" else precision


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
    return classifier


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
