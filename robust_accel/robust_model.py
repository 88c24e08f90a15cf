"""RobustModel: an ordinary module whose forward attacks first and returns the outer loss."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy

from robust_accel.attack_context import AttackMode
from robust_accel.attacks import Attack
from robust_accel.min_max import MinMax
from robust_accel.models import (
    ModelSettings,
    PixelClassifier,
    create_classifier,
    normalized,
)
from robust_accel.objectives import AWP, Objective
from robust_accel.pixels import InputSpace

_SPACES = Literal["pixel", "normalized"]
ROBUST = "_robust_training"  # attribute of a model that make_robust has changed


class RobustModel(nn.Module):
    """Wraps a classifier so that training it by its returned loss is adversarial training.

    Accelerate, DDP, DeepSpeed and the Hugging Face ``Trainer`` need to know nothing of it: the
    attack differentiates in the input through the inner module, so no parameter gradient is
    touched, no reducer hook fires and no byte is sent (equation (2), Algorithm A1 step 5).

    Args:
        model: A timm model's name, any module from images to logits, or a ``PixelClassifier``.
        attack: The inner maximisation, for example ``PGD(eps="8/255")``.
        objective: The outer loss; adversarial training (1) when not given.
        mean, std, size: See ``PixelClassifier``; not with a ``PixelClassifier``. Left out, mean and
            std are those by which the script normalises, else a timm model's own
            (``pretrained_cfg``), else none: the model reads [0, 1].
        input_space: ``pixel``: ``forward`` takes images in [0, 1]. ``normalized``: the script has
            normalised them already by ``input_mean`` and ``input_std``, and they are brought back
            to [0, 1] first, so that eps keeps its unit.
        weight_perturbation: Take the outer loss at adversarial weights, too (``AWP``).
        attack_mode: Mode of the inner module during the attack. ``eval`` (default), or ``train``:
            each submodule keeps its own mode, and BatchNorm normalises by the batch (SyncBatchNorm
            then communicates at each step). Neither changes a buffer, and each submodule's own mode
            is restored, also when the attack raises.

    Attributes:
        classifier: The ``PixelClassifier`` on [0, 1]: what an evaluation attacks.
        min_max: Attack, objective and what they did (``min_max.applied``); its parts may be
            replaced between calls.
    """

    def __init__(
        self,
        model: str | nn.Module,
        attack: Attack,
        objective: Objective | None = None,
        *,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
        input_space: _SPACES = "pixel",
        input_mean: float | Sequence[float] | None = None,
        input_std: float | Sequence[float] | None = None,
        attack_mode: AttackMode = "eval",
        weight_perturbation: AWP | None = None,
    ) -> None:
        super().__init__()
        self.min_max = MinMax(
            attack, objective, attack_mode=attack_mode, weight_perturbation=weight_perturbation
        )
        if input_space not in get_args(_SPACES):
            raise ValueError(f"input_space must be pixel or normalized, got {input_space!r}")
        if {input_mean is not None, input_std is not None} != {input_space == "normalized"}:
            raise ValueError(
                "input_mean and input_std go with input_space='normalized': both, or neither with "
                f"'pixel'; got {input_space!r}, {input_mean}, {input_std}"
            )
        self.input_space = InputSpace(input_mean, input_std, ("input_mean", "input_std"))
        if isinstance(model, nn.Module):
            refuse_robust_inside(model)
        if isinstance(model, str):
            made = create_classifier(ModelSettings(name=model))
            model, size = made.model, made.size if size is None else size
        if not isinstance(model, PixelClassifier):
            mean = input_mean if mean is None else mean
            std = input_std if std is None else std
            model = normalized(model, ("as given", {"mean": mean, "std": std}), size=size)
        elif (mean, std, size) != (None, None, None):
            raise ValueError("mean, std and size are the PixelClassifier's own: set them there")
        self.classifier = model

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        num_labeled: float | None = None,
    ) -> dict[str, Tensor]:
        """Training: attack, then the outer loss. Evaluation: the clean prediction.

        Args:
            pixel_values: [B, C, H, W], floating point, in [0, 1] (or normalised: ``input_space``).
            labels: [B] class indices, or [B, K] probabilities. Training without labels attacks
                the model's own predictions and returns the logits at x_adv, for a script that
                computes its loss itself.
            num_labeled: See ``MinMax.loss``.

        Returns:
            ``logits`` [B, K], at x_adv while training; ``loss`` when labels are given; while
            training also the objective's named parts.

        Raises:
            ValueError: The images' type, shape or range is not what was declared, or the objective
                needs labels.
        """
        if isinstance(self, FSDPModule):
            raise TypeError(
                "under FSDP2 the model itself must be what is sharded: make_robust(model, attack) "
                "instead of RobustModel(model, attack), before accelerator.prepare"
            )
        x = self.pixels(pixel_values)
        if not self.training:
            logits = self.classifier(x)
            return {"logits": logits} | (
                {} if labels is None else {"loss": cross_entropy(logits, labels)}
            )
        if labels is None:
            x_adv = self.min_max.adversarial(self.classifier, x, "call the model with labels")
            return {"logits": self.classifier(x_adv)}
        return self.min_max.loss(self.classifier, x, labels, num_labeled=num_labeled)

    def perturb(
        self, x: Tensor, labels: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Solve (A1): x [B, C, H, W] in [0, 1] -> x_adv of the same shape, detached."""
        return self.min_max.perturb(self.classifier, x, labels, generator)

    def predict(self, x: Tensor) -> Tensor:
        """Predicted classes [B] of clean images x [B, C, H, W] in [0, 1], in the attack's mode."""
        return self.min_max.predict(self.classifier, x)

    def pixels(self, x: Tensor) -> Tensor:
        """Images as ``forward`` takes them, checked -> [B, C, H, W] in [0, 1], fp32."""
        return self.input_space.pixels(x, self.classifier.channels)


def refuse_robust_inside(model: nn.Module) -> None:
    """Raise ValueError where a part of the model attacks already: images would move twice."""
    for module in model.modules():
        if ROBUST in module.__dict__ or isinstance(module, RobustModel):
            name = type(module).__name__
            raise ValueError(
                f"{name} attacks its images already: call make_robust, or RobustModel, once"
            )
