"""What is measured of a step: work and memory by hand, and what cannot be planned."""

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from robust_accel.planning import cost as cost_module
from robust_accel.planning.cost import Cost, measure
from robust_accel.recipe import load_recipe

CPU = torch.device("cpu")


def cost_of(*settings: str, most: int = 4) -> Cost:
    return measure(load_recipe("quickstart", settings), (1, 8, 8), 10, most, CPU)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_module, "_SECONDS", 1e9)


def test_memory_is_what_autograd_keeps_at_a_time_each_tensor_once() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.ones(3, 4)
    with cost_module._saved(model) as saved:
        for _ in range(2):  # one after another: not added up
            y = model(x)
            assert saved.now == 3 * 4 * (4 + 8)  # the input, and the ReLU's: of both that keep it
            y.sum().backward()
            del y
            assert saved.now == 0
    assert saved.most == 3 * 4 * (4 + 8)


def test_work_grows_with_the_attacks_steps() -> None:
    of_steps = [cost_of(f"attack.num_steps={n}", "attack.step_size=0.2").flops for n in (1, 3)]
    recipe = load_recipe("quickstart")
    model = cost_module.create_classifier(recipe.model, num_classes=10, in_chans=1)
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 1, 8, 8))
    of_forward = counter.get_total_flops()
    assert of_steps[1] - of_steps[0] == pytest.approx(2 * 2 * of_forward, rel=0.05)
    assert of_steps[0] == pytest.approx((2 + 3) * of_forward, rel=0.1)


def work(module: nn.Module, x: torch.Tensor) -> cost_module._Operations:
    with cost_module._Operations() as operations:
        module(x).sum().backward()
    return operations


def test_attention_counts_as_its_products_do() -> None:
    """Fused, as CPUs have it, it is the same products, and one more: the backward's own scores."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
    x = torch.rand(2, 3, 32, 32)
    blocks: Any = model.blocks
    found = []
    for fused in (True, False):
        for block in blocks:
            block.attn.fused_attn = fused
        found.append(work(model, x).flops)
    tokens, width = 5, 192
    again = len(blocks) * 2 * len(x) * tokens**2 * width
    assert found[0] - found[1] == again
    with FlopCounterMode(display=False) as counter:  # unfused: it knows all of these
        model(x).sum().backward()
    assert found[1] == counter.get_total_flops()


def test_convolutions_are_counted_apart() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 6, 4))
    found = work(network, torch.rand(2, 3, 8, 8))
    convolution = 2 * 2 * 8 * 6 * 6 * 3 * 9  # forward, and as much for the weights
    assert found.convolutions == 2 * convolution
    assert found.flops - found.convolutions == 3 * 2 * 2 * 8 * 6 * 6 * 4


def test_frozen_parameters_are_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    create = cost_module.create_classifier

    def frozen(*settings: Any, **options: Any) -> Any:
        classifier: Any = create(*settings, **options)
        classifier.model.stem.requires_grad_(False)
        return classifier

    whole = cost_of()
    monkeypatch.setattr(cost_module, "create_classifier", frozen)
    found = cost_of()
    assert found.parameters == whole.parameters
    assert len(found.shapes) < len(whole.shapes) and found.gradients < whole.gradients


@pytest.mark.parametrize(
    ("settings", "passes", "rounds", "losses"),
    [
        (["attack.num_steps=3", "attack.step_size=0.2"], 3 * 2 + 2, 3 + 1, 1),
        (
            ["attack.num_steps=3", "attack.step_size=0.2", "objective.name=trades"],
            1 + 3 * 2 + 4,
            3 + 1,  # what the clean forward has gathered is there for the attack's first
            2,
        ),
    ],
)
def test_each_pass_needs_the_weights(
    settings: list[str], passes: int, rounds: int, losses: int
) -> None:
    found = cost_of(*settings)
    assert (found.gathers, found.rounds, found.losses) == (passes, rounds, losses)


def test_parts_of_memory_are_the_models_and_the_optimizers() -> None:
    found = cost_of("optimizer.name=lamb", "train.ema_decay=0.9")
    recipe = load_recipe("quickstart")
    model = cost_module.create_classifier(recipe.model, num_classes=10, in_chans=1)
    number = sum(p.numel() for p in model.parameters())
    assert found.parameters == number and found.gradients == 4 * number
    assert found.weights == found.average > 4 * number  # with the buffers
    assert found.state == pytest.approx(2 * 4 * number, rel=0.01)
    assert found.kept > 0 and min(found.forward, found.backward, found.update) > 0
    assert found.images == 4
    assert found.has_batch_norm and 0 < found.convolutions < found.flops


ONE_STEP = ("attack={name: pgd, eps: 0.2, num_steps: 1}",)
PGI = "attack={name: fgsm-pgi, eps: 0.2}"


def test_an_attack_that_keeps_perturbations_costs_its_passes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One step, and in the outer loss the logits at its start, too."""
    one_step, kept, alone = (
        cost_of(*settings, most=8) for settings in (ONE_STEP, [PGI], [PGI, "attack.prior_weight=0"])
    )
    assert (one_step.gathers, kept.gathers, alone.gathers) == (4, 6, 4)
    assert alone.flops == pytest.approx(one_step.flops, rel=0.01)
    outer = 3 / (2 + 3)  # forward and backward in images and weights, beside the attack's
    assert kept.flops == pytest.approx((1 + outer) * one_step.flops, rel=0.1)
    assert kept.kept > 1.5 * one_step.kept
    assert "it keeps the perturbation of each image: 200 bytes an image of a worker" in caplog.text


@pytest.mark.parametrize("weights", ["class", "image"])
def test_class_means_cost_what_trades_does(weights: str) -> None:
    trades, ikl = (
        cost_of(*ONE_STEP, f"objective={{name: {o}}}")
        for o in ("trades", f"ikl, weights: {weights}")
    )
    assert (ikl.gathers, ikl.images) == (trades.gathers, trades.images)
    assert ikl.flops == pytest.approx(trades.flops, rel=0.01)
    assert ikl.kept == pytest.approx(trades.kept, rel=0.05)


def test_in_half_precision_less_is_kept() -> None:
    recipe = load_recipe("quickstart")
    kept = [measure(recipe, (1, 8, 8), 10, 2, CPU, p).kept for p in ("no", "bf16")]
    assert kept[1] < 0.8 * kept[0]
