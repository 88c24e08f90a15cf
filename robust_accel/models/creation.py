"""Classifiers by name: any timm model, its folders, and the weights that it starts from."""

import copy
import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import huggingface_hub
import timm
import torch
from annotated_types import Ge, Le
from pydantic import AfterValidator, Field
from torch import nn

from robust_accel.data import ImageSet
from robust_accel.data.classes import match_classes, tell
from robust_accel.files import check_path
from robust_accel.hub import asked_in_vain_once
from robust_accel.models.checkpoint_files import FoundWeights, few, find_weights
from robust_accel.models.cifar import CifarResNet
from robust_accel.models.classifier import PixelClassifier, normalized
from robust_accel.models.conv_stem import CONV_STEMS, keys_of_plain, with_own_stem
from robust_accel.models.published import find_published, tell_pixels, with_code
from robust_accel.models.timm_folder import (
    WEIGHTS,
    Surroundings,
    beside,
    checked_copy,
    model_folder,
    names_of,
    read_config,
    surroundings,
)
from robust_accel.models.weight_files import read_weights
from robust_accel.run_folder import RunFolder
from robust_accel.settings import Flag, Number, PathText, Settings, Whole, listed, not_finite

logger = logging.getLogger(__name__)

_HUB = ("hf-hub:", "hf_hub:")
_LOCAL = "local-dir:"
_ASKED_BY_TIMM = ("pretrained_cfg", "num_classes", "num_features")  # where it keeps a network
# options that change what weights do and none of their shapes, and our own networks' values
_UNSEEN = ("act_layer", "global_pool", "norm_layer", "num_heads", "output_stride", "stem_stride")
_OWN_DEFAULTS = {"act_layer": "relu", "global_pool": "avg", "stem_stride": 1}
_NEW_STEM = "the plain network's, below a new stem"


def check_name(name: str) -> str:
    """A model's name, if a file can have it; raises ValueError else."""
    prefix = _LOCAL if name.startswith(_LOCAL) else ""
    return prefix + check_path(name.removeprefix(prefix))


def _finite(options: dict[str, Any]) -> dict[str, Any]:
    if not_finite(options):
        raise ValueError("finite numbers are wanted")
    return options


class ModelSettings(Settings):
    """The recipe's ``model`` section.

    Args:
        name: A timm model (``timm.list_models()``), with this package's ``preact_resnet18``,
            ``wide_resnet28_10`` and their smaller widths (``cifar.py``), ``convnext_tiny_cvst``,
            ``vit_small_cvst`` and larger ones (``conv_stem.py``), or a timm folder
            (``local-dir:FOLDER``).
        num_classes, in_chans: Taken from the data when not given.
        pretrained: Load timm's weights.
        checkpoint: Weights to start from: a run folder, a timm folder, or a file (safetensors, or a
            torch checkpoint, of which nothing but tensors is read), see ``checkpoint_files.py``.
            The mean, std and size that stand beside the weights hold, where none are given here.
            A network with a convolutional stem also takes the plain network's, but for the stem.
        new_head: Start with a fresh classifier; where the number of classes differs, this is so
            in any case.
        freeze_backbone: Train the classifier alone, see ``PixelClassifier``.
        mean, std: See ``PixelClassifier``; the timm model's own when not given.
        size: Height and width that the model wants, if not the data's own.
        options: Further arguments of the timm model (``drop_path_rate``, ``width``,
            ``act_layer: silu``, ...).
    """

    name: Annotated[str, AfterValidator(check_name)]
    num_classes: Annotated[Whole, Ge(2)] | None = None
    in_chans: Annotated[Whole, Ge(1)] | None = None
    pretrained: Flag = False
    checkpoint: PathText | None = None
    new_head: Flag = False
    freeze_backbone: Flag = False
    mean: Number | tuple[Number, ...] | None = None
    std: Number | tuple[Number, ...] | None = None
    size: Annotated[Whole, Ge(1), Le(16384)] | None = None
    options: Annotated[dict[str, Any], AfterValidator(_finite)] = Field(default_factory=dict)


def create_classifier(
    settings: ModelSettings,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    is_trained: bool = False,
) -> PixelClassifier:
    """Build the model that the settings name; classes and channels are the data's, if not set.

    Args:
        is_trained: It is to be measured: a checkpoint must hold its classifier, too.

    Returns:
        A classifier that says whose mean and std (``statistics_source``) and which weights
        (``weights_source``) it has, with the ``class_names`` that were kept with its weights.

    Raises:
        ValueError: There is no such model, timm refuses its options, or weights do not fit it.
    """
    name = timm_name(settings.name)
    shape = {
        "num_classes": settings.num_classes or num_classes,
        "in_chans": settings.in_chans or in_chans,
    }
    options = {key: value for key, value in shape.items() if value} | settings.options
    try:
        with _source(name, settings.pretrained) as source:
            model: Any = timm.create_model(source, pretrained=settings.pretrained, **options)
    except Exception as error:  # timm, torch, safetensors and the hub have an error for each fault
        raise ValueError(f"name: {name!r} cannot be built with {options}: {error}") from error
    if lacks := [key for key in _ASKED_BY_TIMM if not hasattr(model, key)]:
        said = "timm keeps no such network (build_model_with_cfg sets pretrained_cfg)"
        raise ValueError(f"name: {name!r} has no {listed(lacks)}: {said}")
    if name.startswith(_LOCAL):
        model.pretrained_cfg["file"] = name.removeprefix(_LOCAL)
    named = start = _surroundings(name, model)
    weights_source = name if settings.pretrained else None
    if settings.pretrained and ":" not in name and isinstance(model, CONV_STEMS):
        cfg: Any = model.pretrained_cfg
        weights_source = f"{cfg['hf_hub_id']} ({_NEW_STEM})"
    in_file: dict[str, Any] = {}
    if settings.checkpoint is not None:
        start, in_file, weights_source = _load_checkpoint(model, settings.checkpoint, is_trained)
        _check_same(settings, in_file)
        _check_options(model, start, (named.model_args or {}) | options)
    if settings.new_head:
        model.reset_classifier(model.num_classes)
    given = {"mean": settings.mean, "std": settings.std}
    both = None not in given.values()
    classifier = normalized(
        model,
        ("the recipe's model.mean and model.std" if both else "the recipe", given),
        (str(weights_source), in_file),
        (start.said, start.statistics),
        size=settings.size or start.size or named.size,
        freeze_backbone=settings.freeze_backbone,
    )
    classifier.weights_source = weights_source
    tell_pixels(classifier, start)
    loaded = weights_source is not None and not settings.new_head
    if loaded and start.class_names is not None and len(start.class_names) == model.num_classes:
        classifier.class_names = start.class_names
    classifier.model_args = (named.model_args or {}) | options
    classifier.model_args.pop("num_classes", None)  # timm's folder has it elsewhere
    return classifier


@contextmanager
def _source(name: str, pretrained: bool) -> Iterator[str]:
    """What timm is given of a name: of a folder, what has been checked of it."""
    if name.startswith(_LOCAL):
        with checked_copy(Path(name.removeprefix(_LOCAL)), weights=pretrained) as copied:
            yield f"{_LOCAL}{copied}"
    elif pretrained or name.startswith(_HUB):
        with asked_in_vain_once():
            yield name
    else:
        yield name


def timm_name(name: str) -> str:
    """What timm is asked for: a name of its own, ``local-dir:FOLDER``, or ``hf-hub:NAME``.

    Raises:
        ValueError: ``name: ...``: nothing of that name is known, and where it was looked for.
    """
    folder = Path(name.removeprefix(_LOCAL))
    if name.startswith(_HUB):
        return name
    try:
        if not name.startswith(_LOCAL) and timm.is_model(name):
            _check_tag(name)
            return name
        if (folder / "config.json").exists():
            read_config(folder)
            return f"{_LOCAL}{folder}"
    except ValueError as error:
        raise ValueError(f"name: {error}") from error
    raise ValueError(f"name: {_nothing_there(name, folder)}")


def _check_tag(name: str) -> None:
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError:
        base = name.partition(".")[0]
        tags = [tag for tag in timm.list_pretrained(f"{base}*") if tag.partition(".")[0] == base]
        raise ValueError(
            f"timm has {base}, but no weights {name}; it has {few(tags, number=8) or 'none'}"
        ) from None


def _nothing_there(name: str, folder: Path) -> str:
    """Where a model was looked for, and which names are close."""
    run = RunFolder(folder)
    if run.recipe.exists():
        return (
            f"{folder} is a run: local-dir:{run.model} names its network, and "
            f"model.checkpoint={folder} starts from its weights"
        )
    if folder.is_dir():
        return (
            f"{folder} is a folder, but holds neither recipe.yaml (a run) nor config.json (a "
            "timm folder)"
        )
    if folder.is_file():
        return f"{folder} is a file: name its network, and model.checkpoint={folder} its weights"
    others = [str(path) for path in folder.parent.glob("*") if path.is_dir()]
    close = difflib.get_close_matches(str(folder), others, n=3)
    if name.startswith(_LOCAL):
        return f"no folder {folder}" + (f" (close: {', '.join(close)})" if close else "")
    if "/" not in name:
        close += difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=4)
    hint = f"close names: {', '.join(close)}" if close else "see timm.list_models()"
    hub = f"; hf-hub:{name} would be the hub's" if name.count("/") == 1 else ""
    return f"no folder {name!r}, and timm has no model {name!r} ({hint}{hub})"


def _surroundings(name: str, model: Any) -> Surroundings:
    """What stands in the config.json of a folder or a hub's model, or timm's names of classes."""
    if name.startswith(_LOCAL):
        return surroundings(name.removeprefix(_LOCAL))
    if name.startswith(_HUB):
        repository, _, revision = name.partition(":")[2].partition("@")
        config = huggingface_hub.hf_hub_download(
            repository, "config.json", revision=revision or None
        )
        return surroundings(Path(config).parent)
    return Surroundings(class_names=names_of(model.pretrained_cfg.get("label_names")))


def _load_checkpoint(
    model: nn.Module, path: str, is_trained: bool
) -> tuple[Surroundings, dict[str, Any], str]:
    """Load weights in place; a classifier of another number of classes is left out, or refused.

    Returns:
        What stands beside the weights, the pixels' statistics among them, and what was loaded.

    Raises:
        ValueError: ``checkpoint: ...``: it cannot be read, or does not hold this model.
    """
    try:
        file = _file_of(path)
        own = model.state_dict()
        found = _found(file, model)
        said, weights = f"{path} ({found.said})", dict(found.weights)
        around = with_code(beside(file), found, path)
        new = [key for key in _head_keys(model) if weights[key].shape != own[key].shape]
        if new and is_trained:
            there, here = len(weights[new[0]]), len(own[new[0]])
            raise ValueError(f"it has {there} classes, the model {here} (model.num_classes)")
        if new:
            said += f"; of other classes, and new here: {', '.join(new)}"
            weights |= {key: own[key] for key in new}
            around = replace(around, class_names=None)
        wrong = [
            f"{key} is {list(weights[key].shape)}, not {list(value.shape)}"
            for key, value in own.items()
            if weights[key].shape != value.shape
        ]
        if wrong:
            raise ValueError(f"does not fit: {few(wrong, '; ')}")
    except ValueError as error:
        raise ValueError(f"checkpoint: {path} for {type(model).__name__}: {error}") from error
    model.load_state_dict(weights)
    logger.info("checkpoint: %s", said)
    return around, dict(found.statistics), said


def _found(file: Path, model: nn.Module) -> FoundWeights:
    """The model's weights, also by other code's names, or the plain network's below a new stem."""
    own = model.state_dict()
    plain, content = keys_of_plain(model, own), read_weights(file)
    try:
        return find_weights(content, own)
    except ValueError:
        if (published := find_published(content, model)) is not None:
            return published
        found = None
        with suppress(ValueError):  # then the network's own keys are what is missed
            found = None if plain is None else find_weights(content, plain)
        if found is None:
            raise
    said = f"{found.said}; {_NEW_STEM}"
    return replace(found, weights=with_own_stem(model, own, found.weights), said=said)


def _file_of(path: str) -> Path:
    """The file of weights that a run, a timm folder or a path stands for."""
    folder = model_folder(path) if RunFolder(path).recipe.exists() else Path(path)
    if not folder.is_dir():
        return folder
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    raise ValueError(
        f"it holds neither recipe.yaml (a run) nor weights ({', '.join(WEIGHTS)}): name the file"
    )


def _head_keys(model: Any) -> list[str]:
    """Keys of the weights from features to logits."""
    heads = model.pretrained_cfg["classifier"]
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    keys = [f"{head}.{kind}" for head in heads for kind in ("weight", "bias")]
    return [key for key in keys if key in model.state_dict()]


def with_classes_of(classifier: PixelClassifier, names: Sequence[str] | None) -> None:
    """Let a classifier's outputs be the data's classes, by name where both are known.

    Rows of a classifier that numbers the same classes otherwise are put into the data's order; of
    one with other classes this is said.
    """
    own, known = names or (), classifier.class_names or ()
    classifier.class_names = None if names is None else tuple(names)
    if len(own) != len(known) or not own:
        return
    try:
        order = match_classes(own, known)
        said = "numbers its classes otherwise: put into the data's order"
    except ValueError:
        order, said = (), "is of other classes: model.new_head=true starts with a fresh one"
    if order is not None:
        tell(f"model: the classifier of {classifier.weights_source} {said}")
    if order:
        weights = classifier.model.state_dict()
        for key in _head_keys(classifier.model):
            weights[key].copy_(weights[key][list(order)])


def _check_same(settings: ModelSettings, in_file: dict[str, Any]) -> None:
    """Raise ValueError where the recipe says another mean or std than the weights come with."""
    for key, value in in_file.items():
        given = getattr(settings, key)
        if given is None:
            continue
        if not torch.allclose(torch.as_tensor(given, dtype=value.dtype), value, atol=1e-4):
            raise ValueError(
                f"{key}: {given} is not allowed: {settings.checkpoint} holds the {key} that its "
                f"network was trained with, {[round(v, 4) for v in value.tolist()]}: leave "
                f"model.{key} out"
            )


def _check_options(model: nn.Module, start: Surroundings, args: dict[str, Any]) -> None:
    """Raise ValueError where weights, which fit all the same, are known to be of other options."""
    defaults = _OWN_DEFAULTS if isinstance(model, CifarResNet) else {}
    if start.model_args is None:
        return
    for key in _UNSEEN:
        named = [known.get(key, defaults.get(key)) for known in (start.model_args, args)]
        if key == "global_pool" and None in named:  # timm's files name it, asked for or not
            continue
        there, here = ("silu" if value == "swish" else value for value in named)
        if there != here:
            said = ["its default" if value is None else value for value in named]
            raise ValueError(
                f"checkpoint: the network of {start.said} has {key} {said[0]}, the one here "
                f"{said[1]}: give model.options.{key} as it is there"
            )


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
