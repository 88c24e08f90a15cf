"""How FSDP2 cuts a network, and what it reads back, in one process."""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from robust_accel import PGD, RobustModel
from robust_accel.comm import Meter
from robust_accel.comm.fsdp2 import has_hooks
from robust_accel.models import PixelClassifier
from robust_accel.run_folder import RunFolder
from robust_accel.training.checkpoint import Progress
from robust_accel.training.launcher import Sharding
from robust_accel.training.metrics import Averages, Metrics
from robust_accel.training.shards import Shards

pytestmark = pytest.mark.skipif(not has_hooks(), reason="refused before torch 2.9")


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """In a group of one process: FSDP2 cuts in it as in a larger one."""
    if torch.distributed.is_initialized():
        pytest.skip("another test's process group is open")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield Accelerator(cpu=True)
    torch.distributed.destroy_process_group()


def vit() -> PixelClassifier:
    size: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "num_classes": 7}
    return PixelClassifier(VisionTransformer(depth=2, num_heads=2, **size))


def cut(classifier: PixelClassifier, accelerator: Accelerator, *layers: str) -> Shards:
    return Shards(Sharding(layers, True, False), classifier, None, accelerator, "no", False)


def units(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


LAYERS = {("Block",): 3, ("Block", "Mlp"): 5, ("Mlp", "Block"): 5, ("Linear", "Attention"): 12}


@pytest.mark.parametrize("layers", LAYERS, ids=", ".join)
def test_each_unit_gathers_all_that_is_in_no_unit_inside_of_it(
    layers: tuple[str, ...], accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    classifier = vit()
    cut(classifier, accelerator, *layers)
    assert len(units(classifier)) == LAYERS[layers]
    assert f"FSDP2: {LAYERS[layers]} units, of {', '.join(layers)} and the rest" in caplog.text
    for unit in units(classifier):
        unit.unshard()
        inside = {id(p) for other in units(unit)[1:] for p in other.parameters()}
        for name, parameter in unit.named_parameters():
            assert isinstance(parameter, DTensor) == (id(parameter) in inside), name
        unit.reshard()


@pytest.mark.parametrize("layers", [(), ("VisionTransformer",)])
def test_one_unit_is_told(
    layers: tuple[str, ...], accelerator: Accelerator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    classifier = vit()
    cut(classifier, accelerator, *layers)
    assert units(classifier) == [classifier.model]
    assert "FSDP2: 1 unit, no layer by itself" in caplog.text
    assert "whatever fsdp_reshard_after_forward says" in caplog.text


def test_what_is_channels_last_is_cut_and_left_so(accelerator: Accelerator) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    classifier = PixelClassifier(model).to(memory_format=torch.channels_last)
    assert any(not p.is_contiguous() for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    expected = classifier(x)
    shards = cut(classifier, accelerator)
    logits = classifier(x)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    for name, parameter in shards.whole().model.named_parameters():
        assert parameter.equal(before[name])
        assert parameter.stride() == before[name].stride()


def test_what_is_whole_is_the_average_or_what_is_trained(accelerator: Accelerator) -> None:
    trained, average = vit(), vit()
    weights = [[p.detach().clone() for p in one.parameters()] for one in (trained, average)]
    assert not weights[0][0].equal(weights[1][0])
    shards = Shards(Sharding((), True, False), trained, average, accelerator, "no", False)
    for whole, expected in zip((shards.whole(raw=True), shards.whole()), weights, strict=True):
        assert all(map(torch.equal, whole.parameters(), expected))


def test_what_fsdp2_cannot_cut_is_one_sentence(accelerator: Accelerator) -> None:
    layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(torch.rand(4, 6).T)
    with pytest.raises(ValueError, match=r"^model: FSDP2 cannot cut Linear \(.*non-contiguous"):
        cut(PixelClassifier(layer), accelerator)


FOREIGN: dict[str, tuple[Any, str]] = {
    "another model's": ({"values": {"99.step": 1}}, "99.step is of no parameter of this model"),
    "no number": ({"values": {"step": 1}}, "step is of no parameter of this model"),
    "a number": ({"values": {99: 1}}, "99 is of no parameter of this model"),
    "no mapping": ({"values": [1]}, "values: missing, or no dict"),
    "no groups": ({"param_groups": None}, "param_groups: missing, or no list"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_an_optimizer_of_another_model_is_one_sentence(
    case: str, accelerator: Accelerator, tmp_path: Path
) -> None:
    changes, said = FOREIGN[case]
    classifier = vit()
    shards = cut(classifier, accelerator, "Block")
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9)
    shards.prepare(RobustModel(classifier, PGD()), optimizer)
    classifier(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    shards.save(tmp_path)
    shards.load(tmp_path)
    path = tmp_path / "optimizer.pt"
    torch.save(torch.load(path, weights_only=True) | changes, path)
    with pytest.raises(ValueError, match=rf"optimizer\.pt: .*{said}"):
        shards.load(tmp_path)
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"optimizer\.pt: values: missing"):
        shards.load(tmp_path)


def test_seconds_that_nothing_tells_are_left_out(tmp_path: Path) -> None:
    """As under FSDP2 on GPUs, in a run that began where they were known."""
    meter, gathered, progress = Meter(), Meter(), Progress(comm_exposed_seconds=3.0)
    meter.knows_exposed = False
    about: dict[str, Any] = {"steps_per_epoch": 10, "trackers": False, "gathered": gathered}
    folder = RunFolder(tmp_path)
    metrics = Metrics(folder, Accelerator(cpu=True), progress, meter, **about)
    metrics.start_clock()
    gathered.sent(100)
    metrics.log(Averages(), torch.zeros(2), 0, {})
    metrics.stop_clock()
    (line,) = folder.read_metrics()
    assert "comm_exposed_seconds" not in line
    assert "nonfinite" not in line
    assert line["bytes_of_weights_sent"] == progress.bytes_of_weights_sent == 100
    assert math.isnan(progress.comm_exposed_seconds)
