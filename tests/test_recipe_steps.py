"""Step sizes in a recipe: those that do not fit the ball are refused, by the key to change."""

from unittest.mock import Mock

import pytest

from robust_accel.attacks import DDN, FGSMRS, PGD
from robust_accel.attacks.strength import scaled
from robust_accel.evaluation.any_module import measure
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.recipe import RecipeError, load_recipe
from robust_accel.training.checkpoint import Progress
from robust_accel.training.loop import Loop


def fault(source: str, *overrides: str, **options: object) -> str:
    with pytest.raises(RecipeError) as refused:
        load_recipe(source, overrides, **options)  # type: ignore[arg-type]
    return str(refused.value)


REFUSED = [
    # the quickstart: linf, eps 0.2, 7 steps, here of 0.05; PGD-20 by the rule
    (("attack.eps=0.5", "evaluate.eps=0.2"), "attack.step_size: 7 steps of 0.05 get no further"),
    (("attack.num_steps=1",), "attack.step_size: 1 step of 0.05 gets no"),
    (("attack.norm=l2", "attack.eps=1.0"), "leave it out (null) for 0.3571, or give 0.1429 to 2"),
    (("attack.eps=2/255",), "attack.step_size: 7 steps of 0.05 leap over a ball of eps 0.007843"),
    (("attack.random_start=gaussian", "attack.eps=0.4"), "attack.step_size: 7 steps of 0.05"),
    (("attack.name=fgsm-rs", "attack.eps=4/255", "attack.step_size=10/255"), "attack.step_size: 1"),
    (("attack.name=ddn", "attack.eps=1", "attack.init_norm=0.25"), "attack.init_norm: from 0.25"),
    (("evaluate.pgd.step_size=1/255",), "evaluate.pgd.step_size: 20 steps of 0.003922 get no"),
    (("evaluate.pgd.step_size=0.5",), "evaluate.pgd.step_size: 20 steps of 0.5 leap over"),
    (
        ("evaluate.pgd.step_size=0.02", "evaluate.norm=l2", "evaluate.eps=0.5"),
        "evaluate.pgd.step_size: 20 steps of 0.02 get no further than 0.4",
    ),
    (
        ("evaluate.pgd.step_size=0.05", "evaluate.sweep.num_steps=[1, 10]"),
        "evaluate.sweep.num_steps: 1 is not allowed: pgd.step_size: 1 step of 0.05",
    ),
    (("evaluate.sweep.eps=[0.1, 8]",), "evaluate.sweep.eps: 8.0 is not allowed: in pixel units"),
]


@pytest.mark.parametrize(("overrides", "said"), REFUSED)
def test_steps_that_do_not_search_the_ball_are_refused(overrides, said):
    step = () if "attack.name" in overrides[0] else ("attack.step_size=0.05",)
    found = fault("quickstart", *step, *overrides)
    assert said in found
    assert "\n" not in found


@pytest.mark.parametrize("overrides", [case[0] for case in REFUSED[:4] + REFUSED[7:11]])
def test_left_out_they_follow_from_what_is_overridden(overrides):
    cured = [o for o in overrides if "step_size" not in o]
    recipe = load_recipe(
        "quickstart", [*cured, "attack.step_size=null", "evaluate.pgd.step_size=null"]
    )
    assert isinstance(recipe.attack, PGD)
    assert recipe.attack.fault is None
    assert recipe.settings["attack"]["step_size"] is None  # so that a later override finds it so


def test_short_single_steps_from_a_random_start_are_a_warning(caplog):
    overrides = ["attack.name=fgsm-rs", "attack.eps=8/255", "attack.step_size=4/255"]
    recipe = load_recipe("quickstart", overrides)
    assert recipe.attack == FGSMRS(eps=8 / 255, step_size=4 / 255)
    assert recipe.attack.doubt.startswith("step_size: 1 step of 0.01569 gets no further")
    assert FGSMRS().doubt is None


def test_a_model_that_was_trained_by_such_steps_can_still_be_measured():
    overrides = ["attack.step_size=1/255"]
    recipe = load_recipe("quickstart", overrides, required=("data", "evaluate"))
    assert recipe.evaluate.eps == 0.2
    assert "attack.step_size" in fault("quickstart", *overrides)
    # and certified, where the evaluation's are not asked for
    load_recipe("quickstart", ["evaluate.pgd.step_size=1/255"], required=("model", "data"))


def test_a_radius_of_one_norm_is_none_of_another():
    said = fault("quickstart_standard", "attack.name=pgd", "attack.eps=0.1", "evaluate.eps=null",
                 "evaluate.norm=l2")  # fmt: skip
    assert said.endswith("evaluate.eps: missing: the attack's 0.1 is one of linf, not of l2")


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 9, 10, 50])
def test_the_evaluations_own_steps_reach_the_edge(norm, num_steps):
    settings = EvaluateSettings(norm=norm, eps=0.4).with_threat_model_of(None)
    assert settings.make_pgd(num_steps).fault is None
    assert settings.make_pgd(num_steps, eps=0.01).fault is None
    assert settings.make_pgd(num_steps).step_size == max(0.1, min(2.5 / num_steps, 1) * 0.4)


def test_measuring_refuses_them_before_anything_is_spent():
    with pytest.raises(ValueError, match=r"^pgd.step_size: 20 steps of 0.007843 get no further"):
        measure(None, None, None, EvaluateSettings(norm="l2", eps=0.5, pgd={"step_size": "2/255"}))
    with pytest.raises(ValueError, match=r"^eps: 8.0 is not allowed: in pixel units"):
        measure(None, None, None, EvaluateSettings(eps=8))
    with pytest.raises(ValueError, match=r"pgd\.step_size"):
        EvaluateSettings(norm="l2", eps=0.5).make_pgd(3, 0.01)


def test_the_paper_recipes_follow_another_radius():
    for name in ("at", "dat_pgd", "trades", "mart"):
        attack = load_recipe(f"cifar10/{name}").attack
        assert attack.step_length == 2 / 255
        recipe = load_recipe(f"cifar10/{name}", ["attack.eps=16/255", "evaluate.eps=16/255"])
        assert recipe.attack.step_length == 4 / 255
        pgd = recipe.evaluate.pgd
        assert recipe.evaluate.make_pgd(pgd.num_steps, pgd.step_size).step_size == 4 / 255
    assert load_recipe("cifar10/smooth_ddn").attack == DDN(eps=64 / 255)


@pytest.mark.parametrize("step_size", [None, 0.08])
def test_a_warm_up_of_eps_keeps_the_steps_in_proportion(step_size):
    recipe = load_recipe("quickstart", ["train.eps_warmup_epochs=4"])
    attack = recipe.attack.model_copy(update={"step_size": step_size})
    loop = Loop.__new__(Loop)
    loop.settings, loop.batches, loop.progress = recipe.train, Mock(steps_per_epoch=10), Progress()
    shares = []
    for epoch in range(6):
        loop.progress.step = 10 * epoch + 9
        weaker = scaled(attack, loop.share_of_eps())
        assert weaker.fault is None
        assert weaker.step_length / weaker.eps == pytest.approx(attack.step_length / attack.eps)
        shares.append(weaker.eps / attack.eps)
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
