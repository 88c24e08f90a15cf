"""An eps that grows with the steps: of every attack, in proportion, and never in evaluation."""

import math
from pathlib import Path

import pytest
from small_runs import quick_run

from robust_accel.attacks import APGD, DDN, FGSMPGI, FGSMRS, NFGSM, PGD, EpsSchedule
from robust_accel.attacks.strength import scaled
from robust_accel.recipe import RecipeError, load_recipe
from robust_accel.run_folder import RunFolder

ATTACKS = [
    PGD(eps=0.2, num_steps=4, step_size=0.1),
    PGD(norm="l2", eps=1.0),
    APGD(eps=0.2),
    FGSMRS(eps=0.2, step_size=0.3),
    NFGSM(eps=0.2),
    FGSMPGI(eps=0.2),
    DDN(eps=1.0, init_norm=0.5, num_steps=20),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_all_lengths_shrink_alike(attack) -> None:
    weaker = scaled(attack, 0.25)
    for key in ("eps", "step_size", "init_norm", "step_length", "reach"):
        length = getattr(attack, key, None)
        if length is not None:
            assert getattr(weaker, key) == pytest.approx(length / 4)
    assert getattr(weaker, "fault", None) is None
    assert scaled(attack, 1.0) is attack


def test_shapes() -> None:
    linear, sine = EpsSchedule(epochs=4, start=0.2), EpsSchedule(shape="sine")
    assert [linear.share(epoch, 10) for epoch in (1, 2, 4, 9)] == pytest.approx([0.4, 0.6, 1, 1])
    assert [sine.share(epoch, 10) for epoch in (2, 5, 10)] == pytest.approx(
        [math.sin(math.pi / 10), math.sqrt(0.5), 1]
    )


def test_it_grows_with_each_step_and_is_whole_in_evaluation(tmp_path: Path) -> None:
    settings = ("train.eps_schedule={shape: sine, epochs: 2}", "train.log_every=1")
    report = quick_run(tmp_path / "whole", *settings)
    lines = RunFolder(tmp_path / "whole").read_metrics()
    found = [line["attack_eps"] for line in lines if "attack_eps" in line]
    steps = report["steps"] // 3  # of an epoch
    grows = [math.sin(math.pi / 2 * min(1, (i + 1) / (2 * steps))) for i in range(3 * steps)]
    assert found == pytest.approx([0.2 * share for share in grows])
    assert report["epochs_of_growing_eps"] == 2
    assert report["applied"]["attack"]["eps"] == pytest.approx(0.2 * grows[0])
    assert load_recipe("quickstart", settings).evaluate.eps == 0.2


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("{epochs: 50}", "eps_schedule.epochs: 50 is after the last of"),
        ("{epochs: 0}", "eps_schedule.epochs: 0 is not allowed"),
        ("{start: 1}", "eps_schedule.start: 1 is not allowed"),
        ("{shape: square}", "eps_schedule.shape: 'square' is not allowed"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("quickstart", [f"train.eps_schedule={schedule}"])


@pytest.mark.parametrize("key", ["train.eps_schedule={epochs: 2}", "train.eps_warmup_epochs=2"])
def test_an_attack_without_eps_has_none_that_grows(key: str) -> None:
    where = key.split("=")[0]
    with pytest.raises(RecipeError, match=f"{where}: NoAttack has no eps that could grow"):
        load_recipe("quickstart_standard", [key, "evaluate.eps=0.2"])


def test_one_of_two_ways_to_grow() -> None:
    with pytest.raises(RecipeError, match=r"train\.eps_schedule: grows eps by steps, and"):
        load_recipe("quickstart", ["train.eps_schedule={}", "train.eps_warmup_epochs=2"])
