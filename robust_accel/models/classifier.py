"""Classifiers on pixels: any timm model by name, with normalisation and resizing inside."""

import copy
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
from annotated_types import Ge
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import interpolate

from robust_accel.data import ImageSet
from robust_accel.pixels import per_channel
from robust_accel.run_folder import RunFolder
from robust_accel.settings import Number, Settings


class PixelClassifier(nn.Module):
    """Maps pixels in [0, 1] to logits: resize, normalise, then the model as it is.

    Args:
        model: Images [B, C, H, W] to logits [B, K], or to an output with ``.logits``
            (transformers' image classifiers).
        mean, std: Of the pixels, one number a channel or one for all. Left out, they are a timm
            model's own (``pretrained_cfg``); a module that has none is taken to read [0, 1].
        size: Height and width that the model wants. Images are resized inside, so that eps is
            measured at the data's own resolution.
        freeze_backbone: Train the classifier of a timm model alone; all below it keeps its weights
            and its BatchNorm statistics, and stays in eval mode.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: float | Sequence[float] | Tensor | None = None,
        std: float | Sequence[float] | Tensor | None = None,
        size: int | tuple[int, int] | None = None,
        freeze_backbone: bool = False,
    ) -> None:
        super().__init__()
        cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        mean = cfg.get("mean", 0.0) if mean is None else mean
        std = cfg.get("std", 1.0) if std is None else std
        self.model = model
        self.model_args: dict[str, Any] = {}  # that build the same timm model again
        self.class_names: tuple[str, ...] | None = None
        self.size = (size, size) if isinstance(size, int) else size
        # not persistent: the state dict holds the model's own keys and nothing else
        self.register_buffer("mean", per_channel(mean, "mean"), persistent=False)
        self.register_buffer("std", per_channel(std, "std"), persistent=False)
        if not bool((self.std > 0).all()):
            raise ValueError(f"std must be > 0 in each channel, got {std}")
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


class ModelSettings(Settings):
    """The recipe's ``model`` section.

    Args:
        name: A timm model (``timm.list_models()``), with this package's ``preact_resnet18``,
            ``wide_resnet28_10`` and their smaller widths, or ``local-dir:FOLDER``.
        num_classes, in_chans: Taken from the data when not given.
        pretrained: Load timm's weights.
        checkpoint: Weights to start from: a run folder, a timm folder, or a file (safetensors, or a
            torch checkpoint, of which nothing but tensors is read).
        new_head: Start with a fresh classifier; where the number of classes differs, this is so
            in any case.
        freeze_backbone: Train the classifier alone, see ``PixelClassifier``.
        mean, std: See ``PixelClassifier``.
        size: Height and width that the model wants, if not the data's own.
        options: Further arguments of the timm model (``drop_path_rate``, ``width``, ...).
    """

    name: str
    num_classes: Annotated[int, Ge(2)] | None = None
    in_chans: Annotated[int, Ge(1)] | None = None
    pretrained: bool = False
    checkpoint: str | None = None
    new_head: bool = False
    freeze_backbone: bool = False
    mean: Number | tuple[Number, ...] | None = None
    std: Number | tuple[Number, ...] | None = None
    size: Annotated[int, Ge(1)] | None = None
    options: dict[str, Any] = Field(default_factory=dict)


def create_classifier(
    settings: ModelSettings, *, num_classes: int | None = None, in_chans: int | None = None
) -> PixelClassifier:
    """Build the model that the settings name; classes and channels are the data's, if not set.

    Raises:
        ValueError: timm has no such model, it refuses its options, or weights do not fit it.
    """
    name = settings.name
    if not name.startswith(("local-dir:", "hf-hub:", "hf_hub:")) and not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=4)
        hint = f"close names: {', '.join(close)}" if close else "see timm.list_models()"
        raise ValueError(f"name: timm has no model {name!r} ({hint})")
    shape = {
        "num_classes": settings.num_classes or num_classes,
        "in_chans": settings.in_chans or in_chans,
    }
    options = {key: value for key, value in shape.items() if value} | settings.options
    try:
        model: Any = timm.create_model(name, pretrained=settings.pretrained, **options)
    except (TypeError, RuntimeError, AssertionError, FileNotFoundError) as error:
        raise ValueError(f"name: {name!r} cannot be built with {options}: {error}") from error
    if settings.checkpoint is not None:
        _load_checkpoint(model, settings.checkpoint)
    if settings.new_head:
        model.reset_classifier(model.num_classes)
    statistics: dict[str, Any] = {}
    for key, value in (("mean", settings.mean), ("std", settings.std)):
        own = model.pretrained_cfg[key]
        if len(own) != options.get("in_chans", len(own)):
            # timm's three-channel ImageNet statistics on grey images, say: their average
            own = sum(own) / len(own)
        statistics[key] = own if value is None else value
    classifier = PixelClassifier(
        model, **statistics, size=settings.size, freeze_backbone=settings.freeze_backbone
    )
    classifier.model_args = _args_of_folder(name) | options
    classifier.model_args.pop("num_classes", None)  # timm's folder has it elsewhere
    return classifier


def model_folder(run: str | Path) -> Path:
    """The timm folder that a run has left.

    Raises:
        ValueError: There is none yet.
    """
    folder = RunFolder(run).model
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no model there yet: has the run been trained to its end?")
    return folder


def _args_of_folder(name: str) -> dict[str, Any]:
    """The arguments with which the model of a ``local-dir:`` was built."""
    if not name.startswith("local-dir:"):
        return {}
    config = Path(name.removeprefix("local-dir:")) / "config.json"
    return json.loads(config.read_text()).get("model_args", {})


def _load_checkpoint(model: Any, path: str) -> None:
    """Load weights in place; a classifier of another number of classes is left out.

    Raises:
        ValueError: The file cannot be read, or does not hold this model.
    """
    try:
        folder = model_folder(path) if RunFolder(path).recipe.exists() else Path(path)
        file = folder / "model.safetensors" if folder.is_dir() else folder
        weights = timm.models.load_state_dict(str(file))
    except Exception as error:  # torch and safetensors have an error for each kind of damage
        raise ValueError(
            f"checkpoint: {path} cannot be read: {str(error) or 'no such file'}"
        ) from error
    own = model.state_dict()
    heads = model.pretrained_cfg["classifier"]
    heads = heads if isinstance(heads, tuple) else (heads,)
    for key in [f"{head}.{kind}" for head in heads for kind in ("weight", "bias")]:
        if key in weights and key in own and weights[key].shape != own[key].shape:
            weights[key] = own[key]
    wrong = [f"{key} is missing" for key in own if key not in weights]
    wrong += [f"{key} is not the model's" for key in weights if key not in own]
    wrong += [
        f"{key} is {list(weights[key].shape)}, not {list(value.shape)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if wrong:
        rest = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"checkpoint: {path} does not fit {type(model).__name__}: {'; '.join(wrong[:3])}{rest}"
        )
    model.load_state_dict(weights)


def check_fits(classifier: PixelClassifier, images: ImageSet, num_classes: int) -> None:
    """Raise ValueError unless the classifier takes images of this shape and has enough classes."""
    shape = "x".join(map(str, images.shape))
    try:
        # a copy: an eval/train round trip would unfreeze what was frozen
        with torch.no_grad():
            logits = copy.deepcopy(classifier).eval()(torch.zeros(1, *images.shape))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"name: the model does not take the data's images of {shape} ({error}); "
            "model.size resizes them inside the model"
        ) from error
    if logits.shape[1] < num_classes:
        raise ValueError(
            f"num_classes: the model has {logits.shape[1]} classes, the data {num_classes}"
        )


def save_model(classifier: PixelClassifier, folder: Path) -> None:
    """Write the model as a timm folder: ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

    Args:
        classifier: From ``create_classifier``; its mean and std go into ``pretrained_cfg``.
        folder: Made when it is not there.
    """
    # without the prefix that torch.compile puts before each key; safetensors wants plain layout
    model: Any = getattr(classifier.model, "_orig_mod", classifier.model)
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    channels = classifier.model_args.get("in_chans", model.pretrained_cfg["input_size"][0])
    statistics = {
        "mean": classifier.mean.flatten().expand(channels).tolist(),
        "std": classifier.std.flatten().expand(channels).tolist(),
    }
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"pretrained_cfg": statistics, "model_args": classifier.model_args},
        safe_serialization=True,
    )
