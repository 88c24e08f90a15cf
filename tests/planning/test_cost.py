"""What is measured of a step: work and memory by hand, and what cannot be planned."""

import pytest
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


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        (["attack.num_steps=3", "attack.step_size=0.2"], 3 * 2 + 2),
        (["attack.num_steps=3", "attack.step_size=0.2", "objective.name=trades"], 1 + 3 * 2 + 4),
    ],
)
def test_each_pass_needs_the_weights(settings: list[str], passes: int) -> None:
    assert cost_of(*settings).gathers == passes


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


def test_what_only_a_training_can_feed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^attack: it keeps .*: plan for one without"):
        cost_of("attack={name: fgsm-pgi, eps: 0.2}")


def test_in_half_precision_less_is_kept() -> None:
    recipe = load_recipe("quickstart")
    kept = [measure(recipe, (1, 8, 8), 10, 2, CPU, p).kept for p in ("no", "bf16")]
    assert kept[1] < 0.8 * kept[0]
