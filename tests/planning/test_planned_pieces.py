"""How a plan cuts networks, and that two real processes send what it says of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from launching import FSDP2, SMALL, Forked

from robust_accel.comm.fsdp2 import has_hooks
from robust_accel.comm.traffic import Machines
from robust_accel.models import create_classifier
from robust_accel.planning.cost import measure
from robust_accel.planning.estimate import Job, engines, estimates
from robust_accel.planning.pieces import Unit, layers_of, piece, units_of, whole_at_a_time
from robust_accel.recipe import load_recipe

CPU = torch.device("cpu")
VIT = "model={name: vit_tiny_patch16_224, options: {img_size: 8, patch_size: 4, depth: 2, "
VIT += "embed_dim: 24}}"
STEP = (*SMALL, VIT, "train.max_steps=1", "train.validation_steps=1", "data.test_size=20")
STEP += ("evaluate.pgd=null", "evaluate.train_images=null")
FP32 = ("communication={name: allreduce}",)
KEPT = (*FP32, "train.keep_gathered=true")
QUANTISED = ("communication.weight_bits=8", "train.precision=bf16", "train.gradient_accumulation=2")


@pytest.mark.skipif(not has_hooks(), reason="refused before torch 2.9")
@pytest.mark.parametrize(
    ("settings", "engine", "layer"),
    [
        ((*QUANTISED, "objective.name=trades"), "FSDP2", "Block"),
        pytest.param(FP32, "FSDP2", "", marks=pytest.mark.long),
        pytest.param(FP32, "FSDP2", "Block", marks=pytest.mark.long),
        pytest.param((*FP32, "objective.name=trades"), "FSDP2", "Block", marks=pytest.mark.long),
        ((*KEPT, "objective.name=trades"), "FSDP2, keep_gathered", "Block"),
        pytest.param(KEPT, "FSDP2, keep_gathered", "Block", marks=pytest.mark.long),
        pytest.param((*QUANTISED, "communication.bits=4"), "FSDP2", "Mlp", marks=pytest.mark.long),
    ],
)
def test_bytes_are_those_that_two_processes_count(
    settings: tuple[str, ...], engine: str, layer: str, tmp_path: Path
) -> None:
    run = ("train", "quickstart", *STEP, *settings, f"output={tmp_path / 'run'}")
    launched = FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": layer}
    if not layer:  # all at once
        launched["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP"
        del launched["FSDP_TRANSFORMER_CLS_TO_WRAP"]
    code, output = Forked(*run, environment=launched).wait()
    assert code == 0, output
    applied = json.loads((tmp_path / "run/report.json").read_text())["applied"]
    recipe = load_recipe("quickstart", [*STEP, *settings])
    assert recipe.train is not None
    half = recipe.train.precision == "bf16"
    cost = measure(recipe, (1, 8, 8), 10, 2, CPU, "bf16" if half else "no")
    network = create_classifier(recipe.model, num_classes=10, in_chans=1).model
    cost = replace(cost, units=units_of(network, layer))
    job = Job(cost, Machines(2, 1), 1e6, 2, recipe.train.gradient_accumulation, half, CPU)
    (held,) = (one for one in engines(job, recipe.communication) if one.name == engine)
    (one,) = estimates(job, [held], {"it": recipe.communication})
    assert held.leaving == pytest.approx(applied["bytes_of_weights_sent"], rel=0.02)
    assert one.traffic.sent == pytest.approx(applied["bytes_sent"], rel=0.02)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vit_tiny_patch16_224", "Block"),
        ("convnext_atto", "ConvNeXtBlock"),
        ("resnet18", "BasicBlock"),
        ("resnet50", "Bottleneck"),
    ],
)
def test_layers_are_those_that_leave_the_least_whole(name: str, layer: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    found, units = layers_of(network)
    assert found == layer
    number = sum(p.numel() for p in network.parameters())
    assert sum(unit.size for unit in units) == number
    assert whole_at_a_time(units) < number / 2
    assert len(units) == 1 + sum(type(m).__name__ == layer for m in network.modules())


def test_a_network_without_layers_is_one_unit() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    network[1].requires_grad_(False)
    assert layers_of(network) == ("", (Unit(((8, 4), (8,)), ((2, 8), (2,))),))


def test_pieces_are_filled_up() -> None:
    """As FSDP2 sends them: what has few rows costs many workers more than it is."""
    assert [piece((64, 3, 3), n).size for n in (1, 4, 36, 1000)] == [576, 144, 18, 9]
    assert piece((1, 197, 384), 1000).size == 197 * 384
    assert piece((512,), 1000).raw and not piece((512, 4), 1000).raw
