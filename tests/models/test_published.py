"""Networks of TRADES, AWP and RobustBench by their own names: the same logits, or refused."""

import copy
import itertools
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from robust_accel.models import ModelSettings, PixelClassifier, create_classifier
from robust_accel.models.published import find_published

State = dict[str, Tensor]


def conv(ins: int, outs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(ins, outs, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    """Pre-activation: what is added is the input, or where the shape changes, of its activation."""

    def __init__(self, ins: int, outs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(ins), conv(ins, outs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outs), conv(outs, outs, 3)
        self.name = shortcut
        if ins != outs:
            one = conv(ins, outs, 1, stride)
            self.add_module(shortcut, one if shortcut == "convShortcut" else nn.Sequential(one))

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(x))
        added = getattr(self, self.name)(out) if hasattr(self, self.name) else x
        return added + self.conv2(relu(self.bn2(self.conv1(out))))


def blocks(ins: int, outs: int, number: int, stride: int, shortcut: str) -> nn.Sequential:
    first = Block(ins, outs, stride, shortcut)
    return nn.Sequential(first, *(Block(outs, outs, 1, shortcut) for _ in range(number - 1)))


class Stage(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.layer = blocks(*shape, "convShortcut")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Wide(nn.Module):
    """The WideResNet of TRADES and RobustBench, with the block that it makes and never calls."""

    def __init__(self, depth: int, width: int, unused: bool = False) -> None:
        super().__init__()
        number, (a, b, c) = (depth - 4) // 6, (16 * width, 32 * width, 64 * width)
        self.conv1 = conv(3, 16, 3)
        self.block1 = Stage(16, a, number, 1)
        if unused:
            self.sub_block1 = Stage(16, a, number, 1)
        self.block2, self.block3 = Stage(a, b, number, 2), Stage(b, c, number, 2)
        self.bn1, self.fc = nn.BatchNorm2d(c), nn.Linear(c, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(avg_pool2d(x, 8).flatten(1))


class PreAct(nn.Module):
    """The PreActResNet of AWP and RobustBench."""

    def __init__(self, width: int, numbers: tuple[int, ...] = (2, 2, 2, 2)) -> None:
        super().__init__()
        self.conv1 = conv(3, width, 3)
        ins = width
        for i, number in enumerate(numbers):
            outs = width * 2**i
            stage = blocks(ins, outs, number, 2 if i else 1, "shortcut")
            self.add_module(f"layer{i + 1}", stage)
            ins = outs
        self.bn, self.linear = nn.BatchNorm2d(ins), nn.Linear(ins, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.conv1(x)))
        x = relu(self.bn(self.layer4(self.layer3(x))))
        return self.linear(avg_pool2d(x, 4).flatten(1))


def filled(model: nn.Module) -> nn.Module:
    """With no tensor as it begins, and statistics as of training."""
    torch.manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.3, 2)
        elif tensor.is_floating_point():
            tensor.add_(0.1 * torch.randn_like(tensor))
        else:
            tensor.fill_(7)
    return model.eval()


NETWORKS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "10-1": (filled(Wide(10, 1)), "wide_resnet10_1", {}),
    "16-2": (filled(Wide(16, 2)), "wide_resnet16_2", {}),
    "22-1, unused": (filled(Wide(22, 1, True)), "wide_resnet34_10", {"depth": 22, "width": 1}),
    "16-2, unused": (filled(Wide(16, 2, True)), "wide_resnet28_10", {"depth": 16, "width": 2}),
    "R18": (filled(PreAct(16)), "preact_resnet18_w16", {}),
    "R18, narrow": (filled(PreAct(8)), "preact_resnet18", {"width": 8}),
    "R34": (filled(PreAct(8, (3, 4, 6, 3))), "preact_resnet18", {"depth": 34, "width": 8}),
}
AS_THEY_ARE = {"mean": 0.0, "std": 1.0}


def saved(content: Any, folder: Path) -> Path:
    torch.save(content, folder / "published.pt")
    return folder / "published.pt"


def load(path: Path, name: str, options: dict[str, Any], **settings: Any) -> PixelClassifier:
    about = {"name": name, "options": options, "checkpoint": str(path)} | settings
    return create_classifier(ModelSettings(**about), num_classes=4).eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def same(model: nn.Module, other: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = copy.deepcopy(other).double()(x.double())
        assert expected.std() > 1e-2  # not all alike
        torch.testing.assert_close(model.double()(x.double()), expected, rtol=1e-5, atol=1e-5)


# The same function ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_logits_are_those_of_the_published_network(kind: str, x: Tensor, tmp_path: Path) -> None:
    network, *ours = NETWORKS[kind]
    found = load(saved(network.state_dict(), tmp_path), *ours, **AS_THEY_ARE)
    same(found, network, x)
    left = "whose sub_block1 no code calls: left" in str(found.weights_source)
    assert left == ("unused" in kind)


@pytest.mark.parametrize(
    ("kind", "container", "prefix"),
    itertools.product(
        ("22-1, unused", "R18"),
        ("state_dict", "model_state_dict", "last", "model_ema"),
        ("module.", "model.", "module.1.", "_orig_mod.module."),
    ),
)
def test_in_any_container_and_after_any_prefix(
    kind: str, container: str, prefix: str, x: Tensor, tmp_path: Path
) -> None:
    network, *ours = NETWORKS[kind]
    state = {prefix + key: value for key, value in network.state_dict().items()}
    path = saved({container: state, "epoch": 76, "lr": 0.1}, tmp_path)
    same(load(path, *ours, **AS_THEY_ARE), network, x)


@pytest.mark.parametrize("kind", ["22-1, unused", "R18"])
def test_files_of_old_torch_have_no_counters(kind: str, x: Tensor, tmp_path: Path) -> None:
    network, *ours = NETWORKS[kind]
    state = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    same(load(saved(state, tmp_path), *ours, **AS_THEY_ARE), network, x)


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        (lambda: Wide(34, 10, True), "wide_resnet34_10"),
        (lambda: Wide(28, 10), "wide_resnet28_10"),
        (lambda: PreAct(64), "preact_resnet18"),
    ],
)
def test_the_networks_of_the_papers_have_the_same_shapes(theirs: Any, name: str) -> None:
    with torch.device("meta"):
        model, shapes = timm.create_model(name, num_classes=4), theirs().state_dict()
    file = {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in shapes.items()}
    found = find_published(file, model)
    assert found is not None
    own = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in found.weights.items()} == own


def test_a_head_of_other_classes_is_new(tmp_path: Path) -> None:
    network, *ours = NETWORKS["R18"]
    path = saved(network.state_dict(), tmp_path)
    settings = ModelSettings(name=ours[0], checkpoint=str(path))
    found = create_classifier(settings, num_classes=7)
    assert "new here: head.fc.weight, head.fc.bias" in str(found.weights_source)
    assert found.model.stem.weight.equal(network.conv1.weight)


def test_our_own_names_go_first(x: Tensor, tmp_path: Path) -> None:
    network, name, options = NETWORKS["10-1"]
    own = filled(timm.create_model(name, num_classes=4))
    path = saved({"net": own.state_dict(), "teacher": network.state_dict()}, tmp_path)
    same(load(path, name, options, **AS_THEY_ARE), own, x)


# Pixels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["10-1", "R18"])
def test_a_mean_and_std_that_are_not_there_are_told(
    kind: str, x: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network, *ours = NETWORKS[kind]
    path = saved(network.state_dict(), tmp_path)
    said = r"comes without mean and std of the pixels: .*\(model.mean=0 model.std=1\).*"
    timms = r"0\.4914, .*; 0\.2471, .* \(timm's pretrained_cfg of "
    for given, here in (({}, timms), ({"mean": 0.5}, r"0\.5; 0\.2471, ")):
        caplog.clear()
        load(path, *ours, **given)
        assert re.search(f"{said} Here they are {here}", caplog.text)
    caplog.clear()
    load(path, *ours, **AS_THEY_ARE)
    assert "of the pixels" not in caplog.text


class Normalized(nn.Module):
    def __init__(self, network: nn.Module, mu: Tensor, sigma: Tensor) -> None:
        super().__init__()
        self.network, self.mu, self.sigma = network, mu.double(), sigma.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.network((x - self.mu.reshape(3, 1, 1)) / self.sigma.reshape(3, 1, 1))


@pytest.mark.parametrize("kind", ["10-1", "R18"])
def test_a_mean_and_std_in_the_file_are_applied(
    kind: str, x: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network, *ours = NETWORKS[kind]
    mu, sigma = torch.tensor([0.2, 0.5, 0.7]), torch.tensor([0.3, 0.2, 0.25])
    shape = (1, 3, 1, 1)
    state = network.state_dict() | {"mu": mu.reshape(shape), "sigma": sigma.reshape(shape)}
    found = load(saved(state, tmp_path), *ours)
    same(found, Normalized(network, mu, sigma), x)
    assert "of the pixels" not in caplog.text


# Other functions --------------------------------------------------------------------------------


def renamed(network: nn.Module, *names: tuple[str, str]) -> State:
    state = network.state_dict()
    for pattern, name in names:
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    return state


def without(network: nn.Module, start: str) -> State:
    return {k: v for k, v in network.state_dict().items() if not k.startswith(start)}


WIDE, R18 = NETWORKS["16-2"][0], NETWORKS["R18"][0]
DEEPMIND = (
    *((r"^conv1", "init_conv"), (r"block(\d)\.layer", r"layer.\1.block"), ("^bn1", "batchnorm")),
    *(("bn1", "batchnorm_0"), ("bn2", "batchnorm_1"), ("convShortcut", "shortcut")),
    *(("fc", "logits"), (r"\.conv1", ".conv_0"), (r"\.conv2", ".conv_1")),
)
SHORTCUT_NORM = {"layer2.0.shortcut.1.weight": torch.ones(32)}
OTHERS = {
    "DeepMind": (renamed(WIDE, *DEEPMIND), r"it holds DeepMind's .* pads on one side .*SiLU"),
    "post-activation": (R18.state_dict() | SHORTCUT_NORM, "it holds .*post-activation ResNet-18"),
    "Fast AT": (without(R18, "bn."), "it holds a PreActResNet without BatchNorm after the last"),
    "Pang": (without(WIDE, "fc.bias"), "it holds a WideResNet whose classifier has no bias"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["wide_resnet16_2", "preact_resnet18_w16"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_networks_that_compute_something_else_are_refused_by_name(
    kind: str, name: str, prefix: str, tmp_path: Path
) -> None:
    state, said = OTHERS[kind]
    path = saved({"state_dict": {prefix + k: v for k, v in state.items()}}, tmp_path)
    with pytest.raises(ValueError, match=rf"^checkpoint: {path} for .*{said}.*: no network here"):
        load(path, name, {})


@pytest.mark.parametrize(
    ("state", "name", "said"),
    [
        (WIDE.state_dict(), "wide_resnet10_1", r"block1.layer.1.bn1.weight is not the network's"),
        (Wide(10, 2).state_dict(), "wide_resnet16_2", r"\(.*\): block1.layer.1.bn1.weight is miss"),
        (without(WIDE, "block2.layer.1.conv2"), "wide_resnet16_2", "conv2.weight is missing$"),
        (WIDE.state_dict() | {"scale": torch.ones(3)}, "wide_resnet16_2", "scale is not the netw"),
        (WIDE.state_dict(), "preact_resnet18_w16", "the WideResNet of TRADES.* but WideResNet"),
        (R18.state_dict(), "wide_resnet16_2", "the PreActResNet of AWP.* but PreActResNet"),
        (PreAct(8).state_dict(), "preact_resnet18_w16", r"stem.weight is \[8, 3, 3, 3\], not \[16"),
    ],
)
def test_what_does_not_fit_is_said(state: State, name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^checkpoint: .*{said}"):
        load(saved(state, tmp_path), name, {})


@pytest.mark.parametrize("name", ["wide_resnet16_2", "preact_resnet18_w16"])
def test_torchvisions_names_are_not_taken_for_these(name: str, tmp_path: Path) -> None:
    path = saved(timm.create_model("test_resnet", num_classes=4).state_dict(), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit: .* looked for were stem\.weight"):
        load(path, name, {})


@pytest.mark.parametrize("kind", ["16-2", "R18"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"act_layer": "silu"}, "act_layer relu, the one here silu"),
        ({"stem_stride": 2}, "stem_stride 1, the one here 2"),
        ({"global_pool": "max"}, "global_pool avg, the one here max"),
    ],
)
def test_options_that_their_code_has_not_are_refused(
    kind: str, options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    network, name, _ = NETWORKS[kind]
    path = saved(network.state_dict(), tmp_path)
    with pytest.raises(ValueError, match=rf"^checkpoint: the network of {path} has {said}"):
        load(path, name, options)


def test_that_another_network_has_the_same_keys_is_told(
    x: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """fast_adversarial's code gives the shortcuts raw inputs: no key tells the two apart."""
    network, *ours = NETWORKS["R18"]
    with caplog.at_level(logging.WARNING, logger="robust_accel"):
        load(saved(network.state_dict(), tmp_path), *ours, **AS_THEY_ARE)
    assert "taken for the PreActResNet of AWP and RobustBench" in caplog.text
    assert "fast_adversarial has the same keys" in caplog.text
