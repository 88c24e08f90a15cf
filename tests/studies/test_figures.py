"""Figures show the table's numbers, all of them, and say them in the JSON as well."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from studies.conftest import filled

from robust_accel.studies.figures import figures_of
from robust_accel.studies.page import write_page
from robust_accel.studies.plan import Plan
from robust_accel.studies.results import mean_and_half

LEVEL = (
    "runs: {a: {recipe: quickstart}, b: {recipe: quickstart, grid: [],"
    " settings: {attack.num_steps: 2}}}\n"
    "grid: {size: {label: images, values: {80: {data.train_size: 80}, 140: {}}}}\n"
    "columns: {clean (%): clean, PGD (%): pgd}\n"
    "figures: [{name: curve, title: A curve, x: size, y: [clean (%), PGD (%)], log: true}]"
)
BARS = (
    "runs: {a: {recipe: quickstart, label: one, published: {PGD (%): 51.5}},"
    " b: {recipe: quickstart, label: one, settings: {attack.num_steps: 2}},"
    " c: {recipe: quickstart, settings: {attack.num_steps: 3, evaluate.pgd: null}}}\n"
    "columns: {clean (%): clean, PGD (%): pgd}\n"
    "published_of: another network\n"
    "figures: [{name: b.a-r, title: Bars, y: [clean (%), PGD (%)]},"
    " {name: two, title: Two, y: [PGD (%)], runs: [b, c]}]"
)


def written(plan: Plan, folder: Path) -> list[dict]:
    """The figures' part of the JSON; both pictures are there."""
    results = filled(plan, lambda t: (0.5 + 0.1 * t.seed, 0.3 + 0.01 * len(t.cell.name) * t.seed))
    write_page(results, folder, "s", "")
    found = json.loads((folder / "s.json").read_text())
    for figure in found["figures"]:
        for suffix in ("png", "svg"):
            assert (folder / f"{figure['name']}.{suffix}").stat().st_size > 500
    return found["figures"]


def test_a_row_that_an_axis_does_not_multiply_is_level(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(LEVEL, overrides=["data.validation_size=20"])
    results = filled(plan, lambda t: (0.7 if t.cell.run == "b" else 0.5, 0.5))
    (figure,) = figures_of(results)
    assert {name: [(p.x, p.mean) for p in points] for name, points in figure.series} == {
        "a, clean (%)": [(80, 50), (140, 50)],
        "b, clean (%)": [(80, 70), (140, 70)],
        "a, PGD (%)": [(80, 50), (140, 50)],
        "b, PGD (%)": [(80, 50), (140, 50)],
    }


@pytest.mark.parametrize("seeds", [1, 3])
def test_what_a_curve_shows_stands_in_the_json(
    plan_of: Callable[..., Plan], tmp_path: Path, seeds: int
) -> None:
    plan = plan_of(LEVEL, overrides=["data.validation_size=20"], seeds=range(seeds))
    (figure,) = written(plan, tmp_path / "out")
    assert (figure["x"], figure["y"]) == ("images", "accuracy (%)")
    assert [one["name"] for one in figure["series"]][::2] == ["a, clean (%)", "a, PGD (%)"]
    mean, half = mean_and_half([50, 60, 70][:seeds])
    for point in figure["series"][0]["points"]:
        assert point["mean"] == pytest.approx(mean)
        assert point["interval"] == (half and pytest.approx([mean - half, mean + half]))


def test_two_runs_of_one_label_have_each_its_curve(plan_of: Callable[..., Plan]) -> None:
    text = LEVEL.replace("quickstart", "quickstart, label: same")
    plan = plan_of(text, overrides=["data.validation_size=20"])
    (figure,) = figures_of(filled(plan, lambda t: (0.7 if t.cell.run == "b" else 0.5, 0.5)))
    assert [(one.name, one.points[0].mean) for one in figure.series[:2]] == [
        ("same, clean (%)", 50),
        ("same, clean (%)", 70),
    ]


@pytest.mark.parametrize("seeds", [1, 3])
def test_without_an_axis_a_row_has_bars_of_its_means(
    plan_of: Callable[..., Plan], tmp_path: Path, seeds: int
) -> None:
    bars, two = written(plan_of(BARS, seeds=range(seeds)), tmp_path / "out")
    clean, pgd = (one["points"] for one in bars["series"])
    assert [point["x"] for point in clean] == ["one", "one", "c"]
    assert [point["x"] for point in pgd] == ["one", "one"]  # of c none is measured
    assert [point.get("published") for point in pgd] == [51.5, None]
    assert all("published" not in point for point in clean)
    for point in clean:
        assert (point["interval"] is None) == (seeds == 1)
        assert point["mean"] == pytest.approx(mean_and_half([50, 60, 70][:seeds])[0])
    assert [[p["x"] for p in one["points"]] for one in two["series"]] == [["one"]]
