"""The folder that timm loads, config.json and model.safetensors, and what timm does not keep there.

What ``PixelClassifier`` does outside of the network, timm ignores: it stands in config.json under
``robust_accel``, and ``create_classifier`` restores it.
"""

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from robust_accel.files import INCOMPLETE, read_json, write_json, written_whole
from robust_accel.models.classifier import PixelClassifier
from robust_accel.models.config_file import described
from robust_accel.models.weight_files import check_readable, read_weights
from robust_accel.plain_yaml import read_plain
from robust_accel.run_folder import RunFolder

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_MOST_MODULES = 2**14  # timm's largest have some thousand
_OWN = "robust_accel"  # our section of config.json


@dataclass(frozen=True)
class Surroundings:
    """What stands beside weights, and how images are to be prepared for them.

    Attributes:
        statistics: ``mean`` and ``std``, where they are known.
        size: To which images are resized inside, or None.
        class_names: In the order of the logits, or None.
        said: Where this stands.
        model_args: The network's arguments, or None.
        pixels: What networks of such weights do with pixels, where it is not known of this one.
    """

    statistics: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    class_names: tuple[str, ...] | None = None
    said: str = ""
    model_args: dict[str, Any] | None = None
    pixels: str = ""


def model_folder(run: str | Path) -> Path:
    """The timm folder that a run has left.

    Raises:
        ValueError: There is none yet.
    """
    folder = RunFolder(run)
    if not (folder.model / "config.json").exists():
        steps = folder.steps()
        at = f", its last checkpoint is {steps[-1].name}" if steps else ""
        raise ValueError(
            f"{folder.model}: no model there yet: has the run been trained to its end{at}? "
            "train --resume goes on"
        )
    return folder.model


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's config.json, without what would fetch weights from elsewhere.

    Raises:
        ValueError: There is none, or it is not as timm or this package writes it.
    """
    file = Path(folder) / "config.json"
    if not file.exists():
        raise ValueError(f"{folder}: no config.json there: no timm folder")
    return described(read_json(file), str(file))


def beside(file: Path) -> Surroundings:
    """What is known of a file of weights: from the config.json beside it, or the run it is of."""
    if file.name in WEIGHTS:
        try:
            return surroundings(file.parent)
        except ValueError:  # no timm folder
            pass
    for parent in [*file.parents][1:3]:  # RUN/checkpoints/best.safetensors, .../step-N/...
        run = RunFolder(parent)
        if not run.recipe.exists() or run.checkpoints not in file.parents:
            continue
        if (run.model / "config.json").exists():
            return surroundings(run.model)
        model: dict[str, Any] = read_plain(run.recipe).get("model") or {}
        known = {key: model[key] for key in ("mean", "std") if model.get(key) is not None}
        size = None if model.get("size") is None else (model["size"], model["size"])
        args = model.get("options") if ":" not in str(model.get("name")) else None
        return Surroundings(known, size, None, str(run.recipe), args)
    return Surroundings()


def surroundings(folder: str | Path) -> Surroundings:
    """What a timm folder's config.json says of images and classes.

    Raises:
        ValueError: It is no timm folder.
    """
    config = read_config(folder)
    cfg: dict[str, Any] = config.get("pretrained_cfg") or config
    size = (config.get(_OWN) or {}).get("size")
    names = config.get("label_names") or cfg.get("label_names") or cfg.get("labels")
    return Surroundings(
        {key: cfg[key] for key in ("mean", "std") if cfg.get(key) is not None},
        None if size is None else (int(size[0]), int(size[1])),
        names_of(names),
        f"{folder}/config.json",
        config.get("model_args") or {},
    )


class TooLarge(ValueError):
    """A network that is far larger than its weights."""


@contextmanager
def checked_copy(folder: Path, *, weights: bool) -> Iterator[Path]:
    """A timm folder of config.json as it was checked, and a link to the one file of weights.

    While it is there, no network grows that is far larger than what the file can hold.

    Args:
        weights: Whether they are to be loaded.

    Raises:
        ValueError: There are none, or they cannot be read.
    """
    file = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if weights:
        if file is None:
            raise ValueError(f"{folder} holds no weights ({', '.join(WEIGHTS)})")
        try:
            check = check_readable if file.suffix == ".safetensors" else read_weights
            check(file)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    with tempfile.TemporaryDirectory() as copied:
        write_json(Path(copied, "config.json"), read_config(folder))
        if file is not None:
            Path(copied, file.name).symlink_to(file.resolve())
        with network_up_to(None if file is None else 8 * file.stat().st_size + 2**25):
            _build_without_memory(f"local-dir:{copied}")
            yield Path(copied)


def _build_without_memory(name: str) -> None:
    """Raise ``TooLarge`` before a network, or a table on its way, takes memory."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            timm.create_model(name, pretrained=False)
    except TooLarge:
        raise
    except Exception:  # some cannot be built so; what else is wrong is said where it is built
        pass


@contextmanager
def network_up_to(limit: int | None) -> Iterator[None]:
    """Raise ``TooLarge`` where modules that are made here get more bytes, or are too many.

    Args:
        limit: Bytes of parameters and buffers; None: any number, of any number of modules.
    """
    size, modules = 0, 0

    def counted(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal size
        size += 0 if tensor is None else tensor.numel() * tensor.element_size()
        check()

    def counted_module(module: nn.Module, name: str, other: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        check()

    def check() -> None:
        if limit is not None and (size > limit or modules > _MOST_MODULES):
            raise TooLarge("its config.json makes a network far larger than its weights")

    with ExitStack() as hooks:
        for hook in (
            register_module_parameter_registration_hook(counted),
            register_module_buffer_registration_hook(counted),
            register_module_module_registration_hook(counted_module),
        ):
            hooks.callback(hook.remove)
        yield


def names_of(label_names: Any) -> tuple[str, ...] | None:
    """timm's ``label_names``, a list or a mapping from indices, as a name a class, or None."""
    if isinstance(label_names, Mapping):
        if not all(str(index).isdecimal() for index in label_names):
            return None
        by_index = {int(index): name for index, name in label_names.items()}
        if sorted(by_index) != list(range(len(by_index))):
            return None  # with gaps, which nothing here has
        label_names = [by_index[i] for i in range(len(by_index))]
    return tuple(map(str, label_names)) if label_names else None


def save_model(classifier: PixelClassifier, folder: Path) -> None:
    """Write the model as a timm folder: ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

    Args:
        classifier: From ``create_classifier``; its mean and std go into ``pretrained_cfg``, its
            class names into ``label_names``, its size where only this package looks.
        folder: Made when it is not there. What it holds already is replaced file by file, each in
            one move: it can be read at any moment.
    """
    # without the prefix that torch.compile puts before each key; safetensors wants plain layout
    model: Any = getattr(classifier.model, "_orig_mod", classifier.model)
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    channels = classifier.model_args.get("in_chans", model.pretrained_cfg["input_size"][0])
    statistics = {
        "mean": classifier.mean.flatten().expand(channels).tolist(),
        "std": classifier.std.flatten().expand(channels).tolist(),
    }
    config: dict[str, Any] = {"pretrained_cfg": statistics, "model_args": classifier.model_args}
    names = classifier.class_names
    if names != names_of(model.pretrained_cfg.get("label_names")):  # those of other classes go
        labels = ("label_names", "label_descriptions")
        cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in labels}
        model.pretrained_cfg = cfg
        if names is not None:
            config["label_names"] = list(names)
    if classifier.size is not None:
        config[_OWN] = {"size": list(classifier.size), "resize": "bilinear, antialiased"}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=INCOMPLETE, dir=folder.parent) as written:
        timm.models.save_for_hf(model, written, model_config=config, safe_serialization=True)
        for name in sorted(os.listdir(written), reverse=True):  # the weights before config.json
            with written_whole(folder / name) as whole:
                os.replace(Path(written, name), whole)


def beyond_timm(config: Mapping[str, Any]) -> list[str]:
    """What a saved model does that timm alone does not, in sentences' parts; nothing if equal.

    Args:
        config: The folder's ``config.json``.
    """
    own = config.get(_OWN) or {}
    if "size" not in own:
        return []
    height, width = own["size"]
    return [f"resizes inside to {height}x{width} ({own['resize']}): timm alone does not"]
