"""Schedules at known points, and stepped through torch."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from robust_accel.optim import (
    SCHEDULES,
    Constant,
    Cosine,
    Cyclic,
    OneCycle,
    Piecewise,
    make_scheduler,
)
from robust_accel.recipe import load_recipe

EXAMPLES = [
    Constant(),
    Piecewise(milestones=(4, 6)),
    Cyclic(),
    Cosine(final_factor=0.1),
    OneCycle(),
    OneCycle(anneal="linear"),
]


def learning_rates(schedule, *, epochs, steps_per_epoch, lr=1.0) -> list[float]:
    """The rate at which each optimizer step of a run is taken."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make_scheduler(optimizer, schedule, epochs=epochs, steps_per_epoch=steps_per_epoch)
    rates = []
    for _ in range(epochs * steps_per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_table_names_every_example():
    assert {type(schedule) for schedule in EXAMPLES} == set(SCHEDULES.values())


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (Constant(), {0: 1, 5.5: 1, 10: 1}),
        (Piecewise(milestones=(4, 6)), {0: 1, 3.999: 1, 4: 0.1, 5.999: 0.1, 6: 0.01, 10: 0.01}),
        (Piecewise(milestones=(2.5,), gamma=0.5), {2.4: 1, 2.5: 0.5, 2.6: 0.5}),
        (Piecewise(milestones=()), {0: 1, 10: 1}),
        (Cyclic(), {0: 0, 2.5: 0.5, 5: 1, 7.5: 0.5, 10: 0}),
        (Cyclic(peak="2/5"), {0: 0, 2: 0.5, 4: 1, 7: 0.5, 10: 0}),
        (Cosine(), {0: 1, 2.5: (1 + math.sqrt(0.5)) / 2, 5: 0.5, 10: 0}),
        (Cosine(final_factor=0.2), {0: 1, 5: 0.6, 10: 0.2}),
        (Cosine(warmup_epochs=2), {0: 0.5, 1: 1, 2: 1, 6: 0.5, 10: 0}),
        (OneCycle(), {0: 1 / 25, 1.5: (1 + 1 / 25) / 2, 3: 1, 6.5: 0.5 + 1e-6, 10: 4e-6}),
        (
            OneCycle(anneal="linear", pct_start=0.5, div_factor=10, final_div_factor=1),
            {0: 0.1, 2.5: 0.55, 5: 1, 7.5: 0.55, 10: 0.1},
        ),
    ],
)
def test_known_points_of_ten_epochs(schedule, points):
    for epoch, expected in points.items():
        assert schedule.factor(epoch, 10) == pytest.approx(expected, rel=1e-5, abs=1e-12), epoch


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_warm_up_is_the_papers_staircase(schedule):
    warm = schedule.model_copy(update={"warmup_epochs": 3})
    for epoch in (0, 0.9, 1, 1.5, 2, 2.99):
        assert warm.factor(epoch, 10) == (math.floor(epoch) + 1) / 3  # (k / 3), k = 1, 2, 3


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_factor_stays_in_range_and_does_not_move_after_the_end(schedule):
    factors = [schedule.factor(step / 7, 8) for step in range(8 * 7 + 1)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) == pytest.approx(1, abs=0.02)
    assert schedule.factor(9, 8) == factors[-1]


def test_the_papers_imagenet_run():
    # section 4.1: 5 warm-up epochs, then 30 epochs with a tenth from epochs 20, 25 and 28
    schedule = Piecewise(milestones=(25, 30, 33), warmup_epochs=5)
    rates = learning_rates(schedule, epochs=35, steps_per_epoch=3, lr=0.4)
    expected = [0.08, 0.16, 0.24, 0.32, 0.4] + 20 * [0.4] + 5 * [0.04] + 3 * [4e-3] + 2 * [4e-4]
    assert rates == pytest.approx([rate for rate in expected for _ in range(3)])


def test_a_milestone_between_two_steps_is_not_missed():
    rates = learning_rates(Piecewise(milestones=(1.5,)), epochs=3, steps_per_epoch=3)
    assert rates == pytest.approx([1] * 5 + [0.1] * 4)  # steps at 4/3 and 5/3 epochs


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7, 49, 391])
def test_a_whole_milestone_falls_on_the_first_step_of_its_epoch(steps_per_epoch):
    schedule = Piecewise(milestones=(29,))
    assert schedule.factor((29 * steps_per_epoch - 1) / steps_per_epoch, 30) == 1
    assert schedule.factor(29 * steps_per_epoch / steps_per_epoch, 30) == 0.1


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_a_restored_scheduler_continues(schedule):
    straight = learning_rates(schedule, epochs=8, steps_per_epoch=5)

    def build() -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, make_scheduler(optimizer, schedule, epochs=8, steps_per_epoch=5)

    optimizer, scheduler = build()
    for _ in range(13):
        optimizer.step()
        scheduler.step()
    saved = optimizer.state_dict(), scheduler.state_dict()
    optimizer, scheduler = build()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    resumed = []
    for _ in range(13, 40):
        resumed.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert resumed == straight[13:]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("piecewise", {"milestones": (5, 5)}, "milestones must increase"),
        ("piecewise", {"milestones": (7, 5)}, "milestones must increase"),
        ("piecewise", {"milestones": (0, 5)}, "milestones must be > 0"),
        ("piecewise", {"milestones": (math.nan,)}, "a finite number"),
        ("piecewise", {}, "milestones"),
        ("piecewise", {"milestones": (5,), "gamma": 0}, "gamma"),
        ("cyclic", {"peak": 1.0}, "peak"),
        ("cosine", {"final_factor": 1.5}, "final_factor"),
        ("cosine", {"warmup_epochs": -1}, "warmup_epochs"),
        ("cosine", {"warmup_epochs": 0.5}, "warmup_epochs"),
        ("onecycle", {"pct_start": 0.0}, "pct_start"),
        ("onecycle", {"div_factor": 0.5}, "div_factor"),
        ("onecycle", {"anneal": "cos"}, "anneal"),
        ("constant", {"milestones": (5,)}, "milestones"),
    ],
)
def test_impossible_settings_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        SCHEDULES[name](**options)


def test_a_run_too_short_for_its_schedule():
    with pytest.raises(ValueError, match="warmup_epochs must be < epochs = 5, got 5"):
        learning_rates(Cosine(warmup_epochs=5), epochs=5, steps_per_epoch=2)
    with pytest.raises(ValueError, match=r"milestones must be >= warmup_epochs = 5, got \[3.0\]"):
        learning_rates(Piecewise(milestones=(3, 7), warmup_epochs=5), epochs=9, steps_per_epoch=1)
    with pytest.raises(ValueError, match="steps_per_epoch must be >= 1, got 0"):
        learning_rates(Constant(), epochs=5, steps_per_epoch=0)


def test_what_a_schedule_has_and_does_nothing():
    (doubt,) = Cosine(warmup_epochs=1).doubts(5)
    assert "warmup_epochs: 1 does nothing: its epoch runs at the base rate" in doubt
    (doubt,) = Piecewise(milestones=(3, 5, 7)).doubts(5)
    assert "milestones [5.0, 7.0] are not before the end of 5 epochs" in doubt
    assert len(Piecewise(milestones=(3, 5), warmup_epochs=1).doubts(5)) == 2
    for warmup_epochs in (0, 2):
        assert Piecewise(milestones=(3, 4.9), warmup_epochs=warmup_epochs).doubts(5) == []
    recipe = load_recipe("quickstart", ["schedule.warmup_epochs=1", "train.epochs=3"])
    assert recipe.doubts == recipe.schedule.doubts(3) != []
    assert load_recipe("quickstart").doubts == []
