"""RobustModel: an ordinary module whose forward attacks first and returns the outer loss."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _NormBase

from robust_accel.attacks import Attack
from robust_accel.models import ModelSettings, PixelClassifier, create_classifier, per_channel
from robust_accel.objectives import AWP, Adversarial, Classifier, Objective

AttackMode = Literal["eval", "train"]
InputSpace = Literal["pixel", "normalized"]

_RANGE_TOLERANCE = 1 / 255  # normalising in bf16 and back is off by up to 2^-8


class RobustModel(nn.Module):
    """Wraps a classifier so that training it by its returned loss is adversarial training.

    Accelerate, DDP, DeepSpeed and the Hugging Face ``Trainer`` need to know nothing of it: the
    attack differentiates in the input through the inner module, so no parameter gradient is
    touched, no reducer hook fires and no byte is sent (equation (2), Algorithm A1 step 5).

    Args:
        model: A timm model's name, any module from images to logits, or a ``PixelClassifier``.
        attack: The inner maximisation, for example ``PGD(eps="8/255")``.
        objective: The outer loss; adversarial training (1) when not given.
        mean, std, size: See ``PixelClassifier``; not with a ``PixelClassifier``. Where the script
            normalises, mean and std are those by which it does, when left out.
        input_space: ``pixel``: ``forward`` takes images in [0, 1]. ``normalized``: the script has
            normalised them already by ``input_mean`` and ``input_std``, and they are brought back
            to [0, 1] first, so that eps keeps its unit.
        weight_perturbation: Take the outer loss at adversarial weights, too (``AWP``).
        attack_mode: Mode of the inner module during the attack. ``eval`` (default), or ``train``:
            each submodule keeps its own mode, and BatchNorm normalises by the batch (SyncBatchNorm
            then communicates at each step). Neither changes a BatchNorm buffer, and each
            submodule's own mode is restored, also when the attack raises.

    Attributes:
        classifier: The ``PixelClassifier`` on [0, 1]: what an evaluation attacks.
        perturb_weights: Whether ``weight_perturbation`` is at work; a loop may start it later.
    """

    input_mean: Tensor
    input_std: Tensor

    def __init__(
        self,
        model: str | nn.Module,
        attack: Attack,
        objective: Objective | None = None,
        *,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        size: int | tuple[int, int] | None = None,
        input_space: InputSpace = "pixel",
        input_mean: float | Sequence[float] | None = None,
        input_std: float | Sequence[float] | None = None,
        attack_mode: AttackMode = "eval",
        weight_perturbation: AWP | None = None,
    ) -> None:
        super().__init__()
        if attack_mode not in get_args(AttackMode):
            raise ValueError(f"attack_mode must be eval or train, got {attack_mode!r}")
        if input_space not in get_args(InputSpace):
            raise ValueError(f"input_space must be pixel or normalized, got {input_space!r}")
        if {input_mean is not None, input_std is not None} != {input_space == "normalized"}:
            raise ValueError(
                "input_mean and input_std go with input_space='normalized': both, or neither with "
                f"'pixel'; got {input_space!r}, {input_mean}, {input_std}"
            )
        self.input_space = input_space
        for name, value, default in (
            ("input_mean", input_mean, 0.0),
            ("input_std", input_std, 1.0),
        ):
            buffer = per_channel(default if value is None else value, name)
            self.register_buffer(name, buffer, persistent=False)
        if not bool((self.input_std > 0).all()):
            raise ValueError(f"input_std must be > 0 in each channel, got {input_std}")
        if isinstance(model, str):
            model = create_classifier(ModelSettings(name=model)).model
        if not isinstance(model, PixelClassifier):
            mean = input_mean if mean is None else mean
            std = input_std if std is None else std
            model = PixelClassifier(model, mean=mean, std=std, size=size)
        elif (mean, std, size) != (None, None, None):
            raise ValueError("mean, std and size are the PixelClassifier's own: set them there")
        self.classifier = model
        self.attack = attack
        self.objective = Adversarial() if objective is None else objective
        self.attack_mode = attack_mode
        self.weight_perturbation = weight_perturbation
        self.perturb_weights = weight_perturbation is not None

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Training: attack, then the outer loss. Evaluation: the clean prediction.

        Args:
            pixel_values: [B, C, H, W], floating point, in [0, 1] (or normalised: ``input_space``).
            labels: [B] class indices, or [B, K] probabilities. Training without labels attacks
                the model's own predictions and returns the logits at x_adv, for a script that
                computes its loss itself.

        Returns:
            ``logits`` [B, K], at x_adv while training; ``loss`` when labels are given; while
            training also the objective's named parts.

        Raises:
            ValueError: The images' type, shape or range is not what was declared.
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
            return {"logits": self.classifier(self.perturb(x, self.predict(x)))}
        objective = self._objective_for(x)
        x_adv = self._perturb(objective, x, labels)
        classifier: Classifier = self.classifier
        if self.weight_perturbation is not None and self.perturb_weights:
            with attack_context(self.classifier, "train"):
                classifier = self.weight_perturbation(
                    self.classifier,
                    lambda: objective.loss(self.classifier, x, x_adv, labels)["loss"],
                )
        return objective.loss(classifier, x, x_adv, labels)

    def perturb(
        self, x: Tensor, labels: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Solve (A1): x [B, C, H, W] in [0, 1] -> x_adv of the same shape, detached."""
        return self._perturb(self._objective_for(x), x, labels, generator)

    def adversarial(self, pixel_values: Tensor) -> Tensor:
        """Images as ``forward`` takes them -> attacked ones of the same kind, without labels.

        The attack climbs away from the model's own predictions.
        """
        x = self.pixels(pixel_values)
        x_adv = self.perturb(x, self.predict(x))
        return ((x_adv - self.input_mean) / self.input_std).to(pixel_values.dtype)

    def _objective_for(self, x: Tensor) -> Objective:
        """The objective, with what it draws for this batch."""
        for_batch = getattr(self.objective, "for_batch", None)
        return self.objective if for_batch is None else for_batch(x)

    def _perturb(
        self,
        objective: Objective,
        x: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        with attack_context(self.classifier, self.attack_mode):
            loss_fn = objective.inner_loss(self.classifier, x, labels)
            return self.attack(loss_fn, x, generator=generator)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Predicted classes [B] of clean images x [B, C, H, W] in [0, 1], in the attack's mode."""
        with attack_context(self.classifier, self.attack_mode):
            return self.classifier(x).argmax(dim=1)

    @torch.compiler.disable
    def pixels(self, x: Tensor) -> Tensor:
        """Images as ``forward`` takes them, checked -> [B, C, H, W] in [0, 1], fp32."""
        if isinstance(x, Mapping):
            raise ValueError(
                f"pixel_values must be a tensor, got a {type(x).__name__} with "
                f"{', '.join(map(str, x))}: pass its images, like model(**batch) or "
                "model(batch['pixel_values'])"
            )
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4:
            found = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                "pixel_values must be a floating point tensor [B, C, H, W] in [0, 1] "
                f"(divide uint8 images by 255), got {found}"
            )
        statistics = (self.classifier.mean, self.classifier.std, self.input_mean, self.input_std)
        channels = max(values.numel() for values in statistics)
        height_first = x.shape[1] > 4 >= x.shape[3]  # no image is so narrow
        if height_first or (channels > 1 and x.shape[1] not in (1, channels)):
            wanted = f" with C = {channels} as mean and std have" if channels > 1 else ""
            raise ValueError(
                f"pixel_values must be [B, C, H, W]{wanted}, got {list(x.shape)}"
                + (": pass x.permute(0, 3, 1, 2)" if height_first else "")
            )
        # the ball is measured in fp32: bf16 is spaced 1/256 near white
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.input_space == "normalized":
            x = x * self.input_std + self.input_mean
        low, high = (value.item() for value in x.detach().aminmax())
        # written so that NaN fails too
        if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
            raise ValueError(
                f"pixel_values must lie in [0, 1], got [{low:.3g}, {high:.3g}]"
                + (
                    " after undoing the normalisation: other images than the mean and std given"
                    if self.input_space == "normalized"
                    else ": pass images before normalisation, or say by which mean and std that "
                    "was done (RobustModel: input_space='normalized'; make_robust: mean, std; "
                    "wrap: --mean, --std)"
                )
            )
        return x.clamp(0, 1)


@contextmanager
def attack_context(module: nn.Module, mode: AttackMode) -> Iterator[None]:
    """Put each submodule in the mode, leave BatchNorm's buffers alone, and restore everything.

    Flags are set one by one: an ``eval()``/``train()`` round trip would unfreeze the BatchNorm
    layers that a user froze.
    """
    training = [(m, m.training) for m in module.modules()]
    tracking = [(m, m.track_running_stats) for m in module.modules() if isinstance(m, _NormBase)]
    try:
        if mode == "eval":
            for m, _ in training:
                m.training = False
        else:
            # without tracking, a layer in train mode uses the batch and updates nothing; one that
            # is frozen keeps tracking, or it would lose its statistics
            for m, flag in tracking:
                m.track_running_stats = flag and not m.training
        yield
    finally:
        for m, flag in training:
            m.training = flag
        for m, flag in tracking:
            m.track_running_stats = flag
