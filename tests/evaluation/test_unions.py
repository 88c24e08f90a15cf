"""Several threat models at once: each as if by itself, and what withstands all of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from robust_accel import EvaluateSettings, MultiNorm, api
from robust_accel.evaluation.ledger import read_records
from robust_accel.evaluation.outcomes import Outcomes
from robust_accel.evaluation.unions import attack_of_union, union_of
from robust_accel.recipe import load_recipe
from robust_accel.recipe_builder import RecipeError
from robust_accel.reporting.report import comparison_table
from robust_accel.reporting.views import read_runs
from robust_accel.studies.measures import check_measure, measure
from tests.evaluation.test_autoattack import fitted
from tests.small_runs import run as small_run

BALLS: tuple[Any, ...] = (
    {"norm": "linf", "eps": 0.03},
    {"norm": "l2", "eps": 0.1},
    {"norm": "l1", "eps": 0.35},
)
LINF, L2, L1 = BALLS
GIVEN: dict[str, Any] = {"batch_size": 24, "pgd": {"num_steps": 5}}


def measured(folder: Path | None, **settings: Any) -> api.Measured:
    classifier, images = fitted()
    x = images.images.float() / 255
    return api.evaluate(
        classifier, x, images.labels, EvaluateSettings(**GIVEN | settings), folder=folder
    )


def records(folder: Path, threat: Any, attack: str = "pgd") -> list[dict[str, Any]]:
    return [
        record
        for record in read_records(folder)
        if record["threat_model"] == threat and record["attack"]["name"] == attack
    ]


def right(record: dict[str, Any]) -> list[bool]:
    outcomes = record["outcomes"]
    return [p == y for p, y in zip(outcomes["prediction"], outcomes["label"], strict=True)]


def test_each_ball_is_measured_as_by_itself_and_the_union_is_what_withstands_all(
    tmp_path: Path,
) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    for ball in BALLS:
        measured(alone, **ball)
    found = measured(together, balls=BALLS)
    own = [records(folder, ball) for ball in BALLS for folder in (alone, together)]
    assert all(len(each) == 1 for each in own)
    keys = [each[0]["key"] for each in own]
    assert keys[::2] == keys[1::2]  # the same records: nothing tells that there were others
    flags = [right(each[0]) for each in own[::2]]
    assert len({tuple(own) for own in flags}) > 1  # else the union would be any of them
    (union,) = records(together, {"union": list(BALLS)})
    expected = [all(of_image) for of_image in zip(*flags, strict=True)]
    assert right(union) == expected
    assert union["accuracy"] == sum(expected) / len(expected)
    assert found.pgd is not None and found.pgd.record["key"] == union["key"]
    assert union["attack"]["step_size"] == pytest.approx([0.015, 0.05, 0.175])
    assert repr(found.pgd).startswith("PGD-5, union of linf 0.03, l2 0.1, l1 0.35: ")
    (l1,) = found.against("l1").measurements
    assert l1.accuracy == sum(flags[2]) / 24 and l1.threat_model == L1


def test_nothing_is_done_twice_and_no_union_is_of_another_attack(tmp_path: Path) -> None:
    measured(tmp_path, **L2)
    first = measured(tmp_path, balls=BALLS).pgd
    again = measured(tmp_path, balls=BALLS).pgd
    assert first is not None and again is not None and first.record == again.record
    lines = len(read_records(tmp_path))
    units = sum(1 for path in (tmp_path / "measurements").glob("*.jsonl") for _ in path.open())
    assert lines == 5 and units == 5  # clean, three balls (L2 was known), the union; one unit each
    other = measured(tmp_path, balls=BALLS, pgd={"num_steps": 6}).pgd
    fewer = measured(tmp_path, balls=BALLS[:2]).pgd
    assert other is not None and fewer is not None
    assert len({one.record["key"] for one in (first, other, fewer)}) == 3
    assert other.attack["num_steps"] == 6 and first.attack["num_steps"] == 5
    assert fewer.threat_model == {"union": [LINF, L2]}


def test_autoattack_has_a_union_on_its_own_images(tmp_path: Path) -> None:
    given: dict[str, Any] = {"autoattack": "quick", "autoattack_images": 12}
    found = measured(tmp_path, balls=BALLS[:2], images=20, **given)
    parts = [records(tmp_path, ball, "autoattack")[0] for ball in BALLS[:2]]
    (union,) = records(tmp_path, {"union": [LINF, L2]}, "autoattack")
    assert right(union) == [a and b for a, b in zip(*map(right, parts), strict=True)]
    assert found.autoattack is not None and found.autoattack.images == 12
    assert union["attack"]["version"] == "quick" and "after" not in union
    assert found.pgd is not None and found.pgd.images == 20
    shown = comparison_table([tmp_path])
    for threat in ("linf, eps 0.03 ", "l2, eps 0.1 ", "union of linf 0.03, l2 0.1 "):
        (line,) = [line for line in shown.splitlines() if f"| {threat}" in line]
        assert "(PGD-5, n=20)" in line and "(quick, n=12)" in line


def test_a_union_is_of_the_attack_that_did_most_and_costs_them_all() -> None:
    def outcomes(prediction: list[int], seconds: float) -> Outcomes:
        label = torch.tensor([0, 1, 2])
        found = torch.tensor(prediction)
        share = (found == label).double()
        return Outcomes(torch.arange(3), label, found, share, share, seconds, 10)

    parts = [outcomes([0, 1, 0], 1), outcomes([0, 0, 2], 2)]
    for order in (parts, parts[::-1]):
        union = union_of(order)
        assert union.prediction.tolist() == [0, 0, 0]
        assert union.share.tolist() == [1, 0, 0]
        assert (union.seconds, union.forward_passes) == (3, 20)
    about = attack_of_union([{"name": "a", "k": 1, **LINF}, {"name": "a", "k": 2, "more": 5, **L2}])
    assert about == {"union": [LINF, L2], "name": "a", "k": [1, 2], "more": [None, 5]}


@pytest.mark.long
def test_a_run_shows_each_ball_and_the_union_and_studies_tell_them_apart(tmp_path: Path) -> None:
    balls = "[{norm: linf, eps: 0.2}, {norm: l1, eps: 2}]"
    settings = ("train.epochs=1", "evaluate.images=50", "evaluate.sanity={images: 20}")
    settings += ("attack={name: multi-norm, num_steps: 1, balls: " + balls + "}",)
    small_run(tmp_path, *settings, "data.validation_size=40")
    run, recipe = api.load_run(tmp_path), load_recipe(tmp_path / "recipe.yaml")
    (read,) = read_runs([tmp_path])
    numbers = {
        name: measure(check_measure(name), read, recipe)
        for name in ("clean", "pgd", "pgd linf", "pgd l1", "pgd l2", "autoattack l1")
    }
    assert run.pgd is not None and numbers["pgd"] == 100 * (run.pgd.accuracy or 0)
    assert numbers["pgd"] <= min(numbers["pgd linf"], numbers["pgd l1"])  # type: ignore[type-var]
    assert numbers["pgd l2"] is None and numbers["autoattack l1"] is None
    card = (tmp_path / "model" / "README.md").read_text()
    assert "PGD-5 accuracy, union of linf 0.2 l1 2" in card
    assert "L-infinity, eps = 0.2; L1, eps = 2" in card
    assert run.report["best_against_last"]["attack"] == "PGD-10 in each of 2 balls"
    assert run.report["doubts"] == []
    checks = [one for one in run.measurements if one.purpose == "sanity"]
    assert [one.threat_model for one in checks] == [
        {"norm": "linf", "eps": 0.2},
        {"norm": "l1", "eps": 2.0},
    ]
    with pytest.raises(ValueError, match=r"a measure is wanted: .*pgd or autoattack and a norm"):
        check_measure("pgd l3")


MULTI = "attack={name: multi-norm, balls: [{norm: linf, eps: 0.1}, {norm: l2, eps: 1}]}"
OTHERS = "evaluate.balls=[{norm: linf, eps: 0.2}, {norm: l2, eps: 1}]"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["evaluate.norm=l2", OTHERS], r"evaluate\.balls: norms and radii stand there"),
        ([OTHERS, "evaluate.sweep.eps=[0.1]"], r"evaluate\.sweep: its radii are of one norm"),
        ([MULTI, "evaluate.sweep.num_steps=[5]"], r"evaluate\.sweep: its radii are of one norm"),
        ([OTHERS, "evaluate.pgd.step_size=0.1"], r"evaluate\.pgd\.step_size: 0.1 is a length"),
        ([MULTI, "evaluate.norm=l2"], r"evaluate\.eps: missing: the attack has no eps"),
    ],
)
def test_what_does_not_go_with_several_balls_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("quickstart", settings)


def test_what_is_measured_is_what_is_trained_or_it_is_said() -> None:
    recipe = load_recipe("quickstart", [MULTI])
    assert isinstance(recipe.attack, MultiNorm) and recipe.evaluate.balls == recipe.attack.balls
    assert recipe.doubts == []
    assert load_recipe("quickstart", [MULTI, OTHERS]).doubts == [
        "trained against linf, eps 0.1 and l2, eps 1; measured against linf, eps 0.2 and l2, eps 1 "
        "(evaluate.balls)"
    ]
    one = [MULTI, "evaluate.norm=l2", "evaluate.eps=1"]
    (doubt,) = load_recipe("quickstart", one).doubts
    assert doubt.endswith("measured against l2, eps 1 (evaluate.norm, evaluate.eps)")
    assert len(load_recipe("quickstart", [OTHERS]).doubts) == 1
