"""Classifiers on pixels: any module, with normalisation and resizing inside."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from robust_accel.pixels import pixel_statistics

Numbers = float | Sequence[float] | Tensor


class PixelClassifier(nn.Module):
    """Maps pixels in [0, 1] to logits: resize, normalise, then the model as it is.

    Nothing is assumed of the model: what is not given is not done.

    Args:
        model: Images [B, C, H, W] to logits [B, K], or to an output with ``.logits``
            (transformers' image classifiers).
        mean, std: Of the pixels, one number a channel or one for all; both or neither, which is
            for a model that reads [0, 1]. ``normalized`` takes a timm model's own.
        size: Height and width that the model wants. Images are resized inside, so that eps is
            measured at the data's own resolution.
        freeze_backbone: Train the classifier of a timm model alone; all below it keeps its weights
            and its BatchNorm statistics, and stays in eval mode.
        statistics_source: Whose mean and std these are, for reports.

    Attributes:
        statistics_source: The same; where it was not given, what was done.
        class_names: Of the classes in the order of the logits, where they are known; may be set.
        weights_source: Which weights were loaded, where ``create_classifier`` has loaded some.

    Raises:
        ValueError: Statistics or size are no such numbers.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Numbers | None = None,
        std: Numbers | None = None,
        size: int | tuple[int, int] | None = None,
        freeze_backbone: bool = False,
        statistics_source: str | None = None,
    ) -> None:
        super().__init__()
        means, stds = pixel_statistics(mean, std)
        self.statistics_source = statistics_source or _told(model, mean)
        self.weights_source: str | None = None
        self.model = model
        self.model_args: dict[str, Any] = {}  # that build the same timm model again
        self.class_names: tuple[str, ...] | None = None
        self.size = (size, size) if isinstance(size, int) else size
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size must be a number of pixels >= 1, or two, got {size}")
        # not persistent: the state dict holds the model's own keys and nothing else
        self.register_buffer("mean", means, persistent=False)
        self.register_buffer("std", stds, persistent=False)
        self._frozen = freeze_backbone
        if freeze_backbone:
            trained = {id(p) for module in self._heads() for p in module.parameters()}
            for param in model.parameters():
                param.requires_grad_(id(param) in trained)

    @property
    def channels(self) -> int:
        """C, where mean or std tells it, else 1."""
        return max(self.mean.numel(), self.std.numel())

    def train(self, mode: bool = True) -> "PixelClassifier":
        super().train(mode)
        if self._frozen:
            trained = {id(m) for head in self._heads() for m in head.modules()}
            for module in self.model.modules():
                module.training = mode and id(module) in trained
        return self

    def _heads(self) -> tuple[nn.Module, ...]:
        """The modules from features to logits: timm's distilled models have two."""
        model: Any = self.model
        heads = model.get_classifier() if hasattr(model, "get_classifier") else None
        heads = heads if isinstance(heads, tuple) else (heads,)
        if not all(isinstance(head, nn.Module) and [*head.parameters()] for head in heads):
            raise ValueError(f"freeze_backbone: {type(model).__name__} has no classifier to train")
        return heads

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W] in [0, 1] -> logits [B, K].

        A bf16 or fp16 model (DeepSpeed casts the module) works in its own type, but pixels stay
        fp32, because bf16 is spaced 1/256 near white, and so do the logits, for the losses.
        """
        if self.size is not None and x.shape[-2:] != self.size:
            x = interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=True)
        x = (x - self.mean) / self.std
        weight = next(self.model.parameters(), x)
        logits = logits_of(self.model(x.to(weight.dtype)), self.model)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def normalized(
    model: nn.Module,
    *sources: tuple[str, Mapping[str, Numbers | None]],
    size: int | tuple[int, int] | None = None,
    freeze_backbone: bool = False,
) -> PixelClassifier:
    """The model with the first mean and the first std that a source knows; a timm model's own last.

    Args:
        model: As ``PixelClassifier`` takes it.
        sources: What to call it, and its ``mean`` and ``std``, where it has them.
        size, freeze_backbone: See ``PixelClassifier``.

    Returns:
        A classifier that says where both are from (``statistics_source``).
    """
    cfg = _pretrained_cfg(model)
    name = ".".join(str(cfg[key]) for key in ("architecture", "tag") if cfg.get(key))
    whose = f"timm's pretrained_cfg of {name or type(model).__name__}"
    if cfg.get("source") == "local-dir":
        whose = f"{cfg['file']}/config.json"
    channels = getattr(model, "in_chans", None)
    found: dict[str, Numbers] = {}
    said: dict[str, str] = {}
    for source, known in (*sources, (whose, cfg)):
        for key in ("mean", "std"):
            if key not in found and (value := known.get(key)) is not None:
                found[key], averaged = _for_channels(value, channels, f"{key} of {source}")
                said[key] = source + (" (averaged over the channels)" if averaged else "")
    if len({*said.values()}) > 1:
        said = {"": "; ".join(f"{key}: {source}" for key, source in said.items())}
    return PixelClassifier(
        model,
        mean=found.get("mean"),
        std=found.get("std"),
        size=size,
        freeze_backbone=freeze_backbone,
        statistics_source=next(iter(said.values()), None),
    )


def _pretrained_cfg(model: nn.Module) -> Mapping[str, Any]:
    """timm's description of a model, empty for any other module."""
    cfg = getattr(model, "pretrained_cfg", None)
    return cfg if isinstance(cfg, Mapping) else {}


def _for_channels(value: Numbers, channels: int | None, what: str) -> tuple[Numbers, bool]:
    """Statistics of so many channels: three on grey images, say ImageNet's, are averaged."""
    flat = torch.as_tensor(value, dtype=torch.float64).flatten()
    if channels is None or flat.numel() in (1, channels):
        return value, False
    if flat.numel() != 3:
        raise ValueError(f"{what} has {flat.numel()} numbers, the images {channels} channels")
    return flat.mean().item(), True


def _told(model: nn.Module, mean: Numbers | None) -> str:
    """What a classifier says of its statistics, if nobody says it for it."""
    if mean is not None:
        return "mean and std as given"
    cfg = _pretrained_cfg(model)
    said = "none: the module reads [0, 1]"
    if {"mean", "std"} <= cfg.keys():
        said += f" (its pretrained_cfg is not applied: mean {cfg['mean']}, std {cfg['std']})"
    return said


def logits_of(output: object, model: nn.Module) -> Tensor:
    """The logits [B, K] in what a classifier returns.

    A tensor, alone in a tuple or not; an output or mapping with ``logits``; or the two tensors of a
    distilled model of timm in distilled training, whose mean is what it returns otherwise.

    Raises:
        TypeError: It is anything else.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else output
    logits = getattr(logits, "logits", logits)
    if isinstance(logits, tuple | list):
        if len(logits) == 1:
            (logits,) = logits
        elif len(logits) == 2 and getattr(model, "distilled_training", False):
            logits = (logits[0] + logits[1]) / 2
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits
    found = type(output).__name__
    if isinstance(logits, Tensor):
        found = f"logits of shape {list(logits.shape)}"
    elif isinstance(output, tuple | list):
        found += f" of {', '.join(type(part).__name__ for part in output)}"
    raise TypeError(
        f"{type(model).__name__} is no classifier that is known here: it returned {found}; wanted "
        "are logits [B, K], or an output or mapping with logits"
    )
