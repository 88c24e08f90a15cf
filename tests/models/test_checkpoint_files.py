"""Whatever wraps a network's weights in a file, they load to the same logits, or are refused."""

import argparse
import itertools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from robust_accel import PGD, RobustModel
from robust_accel.models import ModelSettings, PixelClassifier, create_classifier, normalized
from robust_accel.training.checkpoint import save_weights

NAME = "wide_resnet10_1"
MEAN, STD = (0.2, 0.5, 0.7), (0.3, 0.2, 0.25)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small network whose every tensor has left its initial value."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=4).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.05 * torch.rand_like(tensor))
    return model


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def load(path: Path, **settings: Any) -> PixelClassifier:
    fields = {"name": NAME, "checkpoint": str(path)} | settings
    return create_classifier(ModelSettings(**fields), num_classes=4).eval()


def saved(content: Any, folder: Path, suffix: str = ".pth") -> Path:
    path = folder / f"weights{suffix}"
    torch.save(content, path)
    return path


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


# Containers and prefixes ------------------------------------------------------------------------


def beside_training(key: str) -> Callable[[dict], dict]:
    """The state among what training scripts keep with it."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    about = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": optimizer.state_dict()}
    return lambda state: about | {key: state}


CONTAINERS = {
    "bare": lambda state: state,
    **{
        key: beside_training(key)
        for key in ("net", "model_state_dict", "state_dict", "model", "model_ema", "ema", "last")
    },
    "two deep": lambda state: {"checkpoint": {"model": state, "epoch": 1}},
    "with other values": lambda state: {**state, "epoch": 3, "name": "a network"},
}
PREFIXES = (
    *("", "module.", "model.", "net.", "_orig_mod.", "backbone.", "1."),
    *("module._orig_mod.", "_orig_mod.module.", "model.module.", "model._orig_mod.net."),
)


@pytest.mark.parametrize(
    ("container", "prefix"), itertools.product(CONTAINERS, PREFIXES), ids=lambda v: v or "-"
)
def test_every_container_and_prefix_loads_to_the_same_logits(
    container: str, prefix: str, network: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    state = {prefix + key: value for key, value in network.state_dict().items()}
    found = load(saved(CONTAINERS[container](state), tmp_path))
    torch.testing.assert_close(logits(found, x), logits(normalized(network), x))


def compiled_inside(network: nn.Module) -> nn.Module:
    """Its stages compiled one by one, which puts _orig_mod into the middle of keys."""
    again = timm.create_model(NAME, num_classes=4)
    again.load_state_dict(network.state_dict())
    again.stages[0] = torch.compile(again.stages[0], backend="eager")
    return again


class LightningStyle(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.model = network
        self.register_buffer("steps_seen", torch.tensor(7))


REAL = {
    "DataParallel": nn.DataParallel,
    "SWA": AveragedModel,
    "compiled": lambda network: torch.compile(network, backend="eager"),
    "compiled, then averaged": lambda n: AveragedModel(torch.compile(n, backend="eager")),
    "stages compiled": compiled_inside,
    "Lightning": LightningStyle,
    "our own": PixelClassifier,
    "our own in training": lambda network: RobustModel(network, PGD(eps=0.1)),
}


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_real_wrappers_save_is_found(
    kind: str, suffix: str, network: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    wrapper = REAL[kind](network)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": wrapper.state_dict()}, path)
    else:
        save_weights(wrapper, path)  # the best weights of a run are written by this
    torch.testing.assert_close(logits(load(path), x), logits(normalized(network), x))


# Statistics -------------------------------------------------------------------------------------


class Normalize(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).reshape(shape))
        self.register_buffer("std", torch.tensor(STD).reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.reshape(1, 3, 1, 1)) / self.std.reshape(1, 3, 1, 1)


class InFront(nn.Module):
    """A network behind its normalisation, under any names."""

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.normalize, self.model = Normalize(shape), network

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalize(x))


def robustbench(network: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, dict]:
    """mu and sigma among the network's own keys."""
    front = Normalize(shape)
    state = network.state_dict() | {"mu": front.mean, "sigma": front.std}
    return nn.Sequential(front, network), {"module." + key: v for key, v in state.items()}


def in_front(network: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, dict]:
    model = InFront(network, shape)
    return model, dict(model.state_dict())


def sequential(network: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, dict]:
    model = nn.Sequential(Normalize(shape), network)
    return model, dict(model.state_dict())


def pixel_mean(network: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, dict]:
    front = Normalize(shape)
    own = {f"backbone.{key}": value for key, value in network.state_dict().items()}
    return nn.Sequential(front, network), own | {"pixel_mean": front.mean, "pixel_std": front.std}


def around(network: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, dict]:
    model = nn.Sequential(Normalize(shape), network)
    return model, {"mean": list(MEAN), "std": list(STD), "state_dict": network.state_dict()}


WITH_STATISTICS = [robustbench, in_front, sequential, pixel_mean, around]


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (1, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("make", WITH_STATISTICS)
def test_statistics_in_the_file_are_applied(
    make: Callable, shape: tuple[int, ...], network: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    model, state = make(network, shape)
    path = saved(state, tmp_path)
    found = load(path)
    torch.testing.assert_close(logits(found, x), logits(model, x))
    assert found.statistics_source.startswith(str(path))
    agreeing = load(path, mean=MEAN, std=STD)
    assert agreeing.statistics_source == "the recipe's model.mean and model.std"
    torch.testing.assert_close(logits(agreeing, x), logits(model, x))
    for key in ("mean", "std"):
        with pytest.raises(ValueError, match=rf"^{key}: 0.5 is not allowed: .*weights.pth holds"):
            load(path, **{key: 0.5})


def test_numbers_of_something_else_around_the_weights_are_none_of_the_pixels(
    network: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    found = {"acc_mean": [0.91, 0.92, 0.9], "acc_std": [0.01] * 3, "loss.mean": [0.3]}
    found |= {"loss.std": [0.1], "state_dict": network.state_dict()}
    plain = logits(normalized(network), x)
    torch.testing.assert_close(logits(load(saved(found, tmp_path)), x), plain)
    named = found | {"image_mean": list(MEAN), "image_std": list(STD)}
    expected = logits(nn.Sequential(Normalize((3,)), network), x)
    torch.testing.assert_close(logits(load(saved(named, tmp_path)), x), expected)


def test_several_statistics_are_refused(network: nn.Module, tmp_path: Path) -> None:
    _, state = in_front(network, (3,))
    two = {"normalize2.mean": torch.zeros(3), "normalize2.std": torch.ones(3)}
    with pytest.raises(ValueError, match="several means and stds"):
        load(saved(state | two, tmp_path))


# Which copy, and what is refused ----------------------------------------------------------------


def other(network: nn.Module) -> dict[str, Tensor]:
    return {k: v + 1 if v.is_floating_point() else v for k, v in network.state_dict().items()}


@pytest.mark.parametrize(
    "content",
    [
        lambda own, last: {"state_dict": last, "state_dict_ema": own},
        lambda own, last: {"model_ema": own, "model": last},
        lambda own, last: {"net": last, "callbacks": {"ema": {"weights": own}}},
        lambda own, last: {
            **{f"model.{k}": v for k, v in last.items()},
            **{f"ema_model.module.{k}": v for k, v in own.items()},
        },
        lambda own, last: {"model": last, "swa_model": {"module." + k: v for k, v in own.items()}},
    ],
)
def test_an_average_goes_before_the_last_iterate_and_this_is_said(
    content: Callable,
    network: nn.Module,
    x: Tensor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = saved(content(network.state_dict(), other(network)), tmp_path)
    with caplog.at_level(logging.INFO, logger="robust_accel"):
        found = load(path)
    torch.testing.assert_close(logits(found, x), logits(normalized(network), x))
    assert re.search(r"(ema|swa).*; also there, and left: ", str(found.weights_source))
    assert str(found.weights_source) in caplog.text


def test_several_networks_of_equal_rank_are_refused(network: nn.Module, tmp_path: Path) -> None:
    two = {"best": network.state_dict(), "last": other(network)}
    with pytest.raises(ValueError, match=r"several such networks \(best; last\)"):
        load(saved(two, tmp_path))
    same = {"best": network.state_dict(), "last": network.state_dict()}
    assert load(saved(same, tmp_path))


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    "extra", ["adapter.weight", "norm.mean", "model.stages.0.0.conv9.weight", "scale"]
)
def test_tensors_that_nobody_knows_are_refused_by_name(
    prefix: str, extra: str, network: nn.Module, tmp_path: Path
) -> None:
    state = {prefix + key: value for key, value in network.state_dict().items()}
    size = () if extra == "scale" else (3,)
    with pytest.raises(ValueError, match=rf"{extra} is not the network's"):
        load(saved({"state_dict": state | {extra: torch.ones(size)}}, tmp_path))


class Malicious:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_what_does_not_load_says_what_is_there_and_what_was_looked_for(
    network: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    vit = timm.create_model("test_vit").state_dict()
    own = network.state_dict()
    cases = [
        ({"net": vit, "epoch": 3}, r"it holds net \(cls_token, .* more\), epoch; .* stem\.weight"),
        ({}, "it holds nothing"),
        ([1, 2], "it holds a list"),
        ({k: v for k, v in own.items() if k != "stem.weight"}, "stem.weight is missing"),
        ({"net": own, "extra": Malicious()}, "besides tensors it holds .*print"),
        ({"net": own, "acc": np.float64(0.5)}, "besides tensors it holds numpy"),
    ]
    for content, message in cases:
        path = saved(content, tmp_path)
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert str(caught.value).startswith(f"checkpoint: {path} for WideResNet: ")
    for name, message in (("none.pth", "no such file"), ("text.pth", "cannot be read")):
        (tmp_path / "text.pth").write_text("no weights")
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "cut.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither recipe.yaml .* nor weights"):
        load(tmp_path / "empty")
    assert "executed" not in capsys.readouterr().out


def test_a_head_of_other_classes_is_said_to_be_new(network: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(dict(network.state_dict()), path)
    found = load(path, num_classes=7)
    assert "new here: head.fc.weight, head.fc.bias" in str(found.weights_source)
