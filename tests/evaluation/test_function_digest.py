"""The digest of a function sees what decides its answers, wherever a model keeps it."""

import copy
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from robust_accel import make_robust
from robust_accel.attacks import PGD
from robust_accel.evaluation.identity import digest_of_function
from robust_accel.models import ModelSettings, PixelClassifier, create_classifier, save_model

SHAPE = (1, 6, 6)


class Attributes(nn.Module):
    """A network with something that its state dict does not hold."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held, self._private = held, None
        self.linear = nn.Linear(36, 5)
        nn.init.constant_(self.linear.weight, 0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


def linear(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 3)


def scaler(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: factor * x


class Defence:
    def __init__(self, levels: int) -> None:
        self.levels = levels

    def __call__(self, x: Tensor) -> Tensor:
        return (x * self.levels).round() / self.levels


HELD: dict[str, tuple[Any, Any]] = {
    "dict": ({"scale": 2}, {"scale": 3}),
    "object": (Defence(2), Defence(3)),
    "nested": ([(Defence(2),)], [(Defence(3),)]),
    "tensor": (torch.ones(2), torch.zeros(2)),
    "array": (np.ones(2), np.zeros(2)),
    "scalar": (np.float32(1), np.float32(2)),
    "partial": (functools.partial(round, ndigits=1), functools.partial(round, ndigits=2)),
    "closure": (scaler(2.0), scaler(3.0)),
    "bound method": (Defence(2).__call__, Defence(3).__call__),
    "modules in a list": ([linear(0)], [linear(1)]),
    "function of a module": (linear(0).forward, linear(1).forward),
    "class": (Attributes, Defence),
}


@pytest.mark.parametrize("kind", HELD)
def test_what_no_state_dict_holds_is_part_of_the_function(kind: str) -> None:
    one, other = (
        digest_of_function(PixelClassifier(Attributes(held)).eval(), SHAPE) for held in HELD[kind]
    )
    assert one != other
    again = digest_of_function(PixelClassifier(Attributes(copy.deepcopy(HELD[kind][0]))), SHAPE)
    assert one == again


def test_a_shared_module_counts_where_it_is_used() -> None:
    relu, one = nn.ReLU(), linear(0)
    pairs = [(one, relu, one, relu), (one, relu, one)]
    a, b = (
        digest_of_function(PixelClassifier(nn.Sequential(nn.Flatten(), *pair)), (3, 1, 1))
        for pair in pairs
    )
    assert a != b


def test_a_forward_or_a_hook_in_anothers_place_is_another_function() -> None:
    digests = set()
    for change in ("none", "forward", "hook 2", "hook 3"):
        model = Attributes(None)
        if change == "forward":
            model.forward = types.MethodType(lambda self, x: self.linear(-x.flatten(1)), model)  # type: ignore[method-assign]
        elif change != "none":
            factor = float(change[-1])
            model.linear.register_forward_hook(lambda m, i, out, factor=factor: factor * out)
        digests.add(digest_of_function(PixelClassifier(model), SHAPE))
    assert len(digests) == 4


class Counting(Attributes):
    """Notes something at every call, as some networks do."""

    calls, size = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.size = x.shape[-1]
        return super().forward(x)


def test_what_a_forward_pass_notes_is_no_part_of_the_function() -> None:
    classifier = PixelClassifier(Counting(None))
    one = digest_of_function(classifier, SHAPE)
    classifier(torch.rand(3, *SHAPE))
    assert digest_of_function(classifier, SHAPE) == one
    assert digest_of_function(PixelClassifier(Counting(None)), SHAPE) == one


def test_compiled_models_are_the_same_function() -> None:
    model = Attributes(None)
    plain_one = digest_of_function(PixelClassifier(model), SHAPE)
    assert (
        digest_of_function(PixelClassifier(torch.compile(model, backend="eager")), SHAPE)
        == plain_one
    )


def test_what_trains_a_model_is_no_part_of_the_function() -> None:
    model = Attributes(None).train()
    model.linear.register_forward_hook(lambda m, i, out: 2 * out)
    plain_one = digest_of_function(PixelClassifier(model), SHAPE)
    make_robust(model, PGD(eps=0.1, num_steps=2))
    model.linear.register_forward_hook(lambda m, i, out: 3 * out)
    hooked = digest_of_function(PixelClassifier(model), SHAPE)
    assert hooked != plain_one
    model(torch.rand(3, *SHAPE)).sum().backward()
    assert digest_of_function(PixelClassifier(model), SHAPE) == hooked
    model.linear._forward_hooks.popitem()
    assert digest_of_function(PixelClassifier(model), SHAPE) == plain_one


def test_a_device_is_no_part_of_the_function() -> None:
    devices = (torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1))
    held = [PixelClassifier(Attributes([device])) for device in devices]
    assert len({digest_of_function(classifier, SHAPE) for classifier in held}) == 1


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "wide_resnet10_1"])
def test_a_saved_and_loaded_model_is_the_same_function(name: str, tmp_path: Path) -> None:
    size = timm.get_pretrained_cfg(name).input_size[1]
    one = create_classifier(ModelSettings(name=name), num_classes=5, in_chans=3)
    save_model(one, tmp_path / "model")
    folder = ModelSettings(name=f"local-dir:{tmp_path / 'model'}", pretrained=True)
    digests = {digest_of_function(c, (3, size, size)) for c in (one, create_classifier(folder))}
    assert len(digests) == 1
