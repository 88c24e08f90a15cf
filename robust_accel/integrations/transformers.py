"""Callbacks of transformers' ``Trainer``: robust accuracy at each evaluation, quantised gradients.

``make_robust(model, ...)`` before ``Trainer(model, ...)`` is all that training needs. This module
needs transformers, which is not installed with the package.
"""

from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback

from robust_accel.attack_context import attack_context
from robust_accel.attacks import Attack
from robust_accel.comm import Collective, GradientCompression, compress_gradients
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.integrations.in_place import robust_training
from robust_accel.objectives import cross_entropy_of, predicted


class RobustAccuracy(TrainerCallback):
    """Measures accuracy under attack whenever the trainer evaluates.

    It adds ``eval_robust_accuracy``, and ``eval_clean_accuracy`` of the same images, to the metrics
    and the log, with the prefix of the other metrics where there are several sets, so that
    ``metric_for_best_model="robust_accuracy"`` and trackers see them (held-out images of the
    training set are the ones to choose by, not the test set).

    Args:
        trainer: Of a model that ``make_robust`` has changed, with an ``eval_dataset`` of
            ``pixel_values`` and ``labels`` that has a length.
        attack: PGD of 20 steps in the training attack's ball when not given. It climbs the
            cross-entropy, whatever the training objective is.
        images: Attack the first so many images, all when None; shared among the processes, so that
            some of the last may be left out.
        seed: Of the attack.
    """

    def __init__(
        self,
        trainer: Trainer,
        attack: Attack | None = None,
        *,
        images: int | None = 1000,
        seed: int = 0,
    ) -> None:
        training = robust_training(trainer.accelerator.unwrap_model(trainer.model))
        if training is None:
            raise ValueError("RobustAccuracy: call make_robust on the model, before Trainer(...)")
        if attack is None:
            known = EvaluateSettings().with_threat_model_of(training.min_max.attack)
            if known.eps is None:
                raise ValueError(
                    f"RobustAccuracy: attack is missing: {training.min_max.attack!r} has no eps"
                )
            attack = known.make_pgd(num_steps=20)
        self.trainer, self.training, self.attack = trainer, training, attack
        self.images, self.seed = images, seed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # before those that stop by the metrics
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loader: DataLoader = kwargs["eval_dataloader"]
        metrics = kwargs["metrics"]
        # one of several sets has a name of its own: eval_NAME, or what evaluate was called with
        names = [key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")]
        found = self.measure(loader, names[0] if names else "eval")
        metrics.update(found)
        self.trainer.log(dict(found))

    def measure(self, loader: DataLoader, prefix: str = "eval") -> dict[str, float]:
        """Accuracies of the first images of a loader's data set, each image once."""
        accelerator = self.trainer.accelerator
        dataset: Any = loader.dataset
        number = len(dataset) if self.images is None else min(self.images, len(dataset))
        # as many on each process: under FSDP2 the forwards of all wait for one another
        number -= number % accelerator.num_processes
        if number == 0:
            raise ValueError(
                f"RobustAccuracy needs an image for each of {accelerator.num_processes} processes, "
                f"got {len(dataset) if self.images is None else min(self.images, len(dataset))}"
            )
        mine = range(accelerator.process_index, number, accelerator.num_processes)
        # each process its own images: a prepared loader would repeat some to fill the last batch
        batches = DataLoader(
            Subset(dataset, mine),
            batch_size=self.trainer.args.eval_batch_size,
            collate_fn=loader.collate_fn,
        )
        counts = torch.zeros(3, device=accelerator.device)
        generator = torch.Generator(accelerator.device)
        generator.manual_seed(self.seed + accelerator.process_index)
        classifier = self.training.classifier(
            accelerator.unwrap_model(self.trainer.model), accelerator.device
        )
        with attack_context(classifier, "eval"):
            for batch in batches:
                x = self.training.space.pixels(batch["pixel_values"].to(accelerator.device))
                labels = batch["labels"].to(accelerator.device)
                x_adv = self.attack(cross_entropy_of(classifier, labels), x, generator=generator)
                with torch.no_grad():
                    right = [(predicted(classifier(z)) == labels).sum() for z in (x, x_adv)]
                counts += torch.stack([*right, labels.new_tensor(len(labels))])
        clean, robust, total = accelerator.reduce(counts, "sum").tolist()
        shares = {"robust_accuracy": robust / total, "clean_accuracy": clean / total}
        return {f"{prefix}_{name}": share for name, share in shares.items()}


class QuantizedGradients(TrainerCallback):
    """Sends gradients by a protocol, as ``compress_gradients`` does, for a ``Trainer``.

    Args:
        trainer: It prepares its model when training starts, and that is when the protocol is set.
        collective: For example ``QSGD(bits=8)``.

    Attributes:
        compression: The counts of bytes and seconds (``.meter``), once training has begun.
    """

    def __init__(self, trainer: Trainer, collective: Collective) -> None:
        self.trainer, self.collective = trainer, collective
        self.compression: GradientCompression | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.compression = compress_gradients(self.trainer.model_wrapped, self.collective)
        # a resumed run rounds as it would have: one exchange an optimizer step
        self.compression.load_state_dict({"steps": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.compression is not None
        self.compression.close()
