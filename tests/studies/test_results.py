"""Numbers are those of the training that was asked for; the test images choose nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from studies.conftest import TINY, filled, leave

from robust_accel.plain_yaml import RecipeError
from robust_accel.reporting.views import Run
from robust_accel.run_folder import RunFolder
from robust_accel.studies.execution import Done
from robust_accel.studies.measures import held_out, measure
from robust_accel.studies.page import as_json, table, write_page
from robust_accel.studies.plan import Plan
from robust_accel.studies.results import Results
from robust_accel.studies.trial import Trial

TUNED = """
runs:
  a: {recipe: quickstart, tune: {optimizer.lr: [0.1, 0.2, 0.3]}}
  b: {recipe: quickstart}
"""


def claims(*lines: str) -> str:
    return "\nclaims:\n" + "\n".join(
        f"  - {{text: t, run: a, than: b, columns: [clean (%)], {line}}}" for line in lines
    )


def test_what_is_best_on_held_out_images_is_used_for_every_seed(
    plan_of: Callable[..., Plan],
) -> None:
    def number(trial: Trial) -> tuple[float, ...]:  # the best on test images is the worst held out
        rate = dict(trial.tried).get("optimizer.lr")
        return {0.1: (0.9, 0.8, 0.1), 0.2: (0.5, 0.4, 0.3), 0.3: (0.1, 0.1, 0.2)}.get(
            rate, (0.5, 0.5)
        )

    results = filled(plan_of(TUNED), number)
    cell = results.plan.cells[0]
    assert results.chosen(cell) == (("optimizer.lr", 0.2),)
    assert results.values(cell, "clean (%)") == {0: 50.0, 1: 50.0}
    assert len(results.plan.known(results.chosen)) == 3 + 1 + 2 == results.plan.number
    assert results.tuned(cell).at_the_edge == []
    assert results.missing() == []


def test_a_training_that_is_not_finite_is_no_choice(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(TUNED)
    plan.root.mkdir()
    done = Done(plan.root)
    results = Results(plan, done)
    for trial in plan.known(results.chosen):
        if dict(trial.tried).get("optimizer.lr") == 0.3:
            done.add(trial, ("train",), "not finite", 1.0)
        else:
            leave(trial, done, 0.5, 0.4, dict(trial.tried).get("optimizer.lr", 0.0))
    tuned = Results(plan, Done(plan.root)).tuned(plan.cells[0])
    assert [value for _, value in tuned.found] == [10.0, 20.0, None]
    assert dict(tuned.best) == {"optimizer.lr": 0.2}


def test_what_is_tuned_may_be_lists_and_mappings(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    awp, clamp = "train.awp: [null, {gamma: 0.005}, {gamma: 0.01}]", "[[0, 10], [0, 1]]"
    tune = f"tune: {{{awp}, optimizer.weight_norm_clamp: {clamp}}}"
    text = f"runs: {{a: {{recipe: quickstart, {tune}}}}}"

    def number(trial: Trial) -> tuple[float, ...]:
        found = dict(trial.tried)
        best = found["train.awp"] == {"gamma": 0.01}
        return 0.5, 0.5, 0.4 if best and found["optimizer.weight_norm_clamp"] == [0, 1] else 0.1

    results = filled(plan_of(text), number)
    tuned = results.tuned(results.plan.cells[0])
    assert dict(tuned.best) == {
        "train.awp": {"gamma": 0.01}, "optimizer.weight_norm_clamp": [0, 1]
    }  # fmt: skip
    assert tuned.at_the_edge == ["train.awp"]
    write_page(results, tmp_path / "page", "study", "")


@pytest.mark.parametrize(("best", "told"), [(0.1, True), (0.2, False), (0.3, True)])
@pytest.mark.parametrize("sides", ["run: a, than: b", "run: b, than: a"])
def test_the_edge_of_a_grid_is_told_and_beside_its_claims(
    plan_of: Callable[..., Plan], tmp_path: Path, best: float, told: bool, sides: str
) -> None:
    text = TUNED + claims("holds_if: less").replace("run: a, than: b", sides)

    def number(trial: Trial) -> tuple[float, ...]:
        return 0.5, 0.5, float(dict(trial.tried).get("optimizer.lr") == best)

    results = filled(plan_of(text), number)
    assert results.tuned(results.plan.cells[0]).at_the_edge == ["optimizer.lr"] * told
    page = write_page(results, tmp_path / "out", "s", "").read_text()
    (claim,) = json.loads((tmp_path / "out/s.json").read_text())["claims"]
    assert ("; best optimizer.lr of a at the edge of its grid |" in page) == told
    assert claim["at_the_edge"] == ({"a": ["optimizer.lr"]} if told else {})


@pytest.mark.parametrize(
    ("difference", "line", "outcome"),
    [
        ((3.0, 3.1), "holds_if: greater", "holds"),
        ((-3.0, -3.1), "holds_if: greater", "does not hold"),
        ((3.0, -4.0), "holds_if: greater", "open"),
        ((3.0, 3.1), "holds_if: less", "does not hold"),
        ((-3.0, -3.1), "holds_if: less", "holds"),
        ((3.0, 3.1), "{holds_if: greater, margin: 5}", "does not hold"),
        ((-0.5, -0.51), "{holds_if: not_less, margin: 1}", "holds"),
        ((-1.5, -1.51), "{holds_if: not_less, margin: 1}", "does not hold"),
        ((0.5, 0.51), "{holds_if: not_greater, margin: 1}", "holds"),
        ((0.0, 0.0), "holds_if: not_less", "holds"),
        ((0.0, 0.0), "holds_if: not_greater", "holds"),
        ((0.0, 0.0), "holds_if: greater", "does not hold"),
        ((0.0, 0.0), "holds_if: less", "does not hold"),
    ],
)
def test_a_claim_is_decided_by_differences_within_seeds(
    difference: tuple[float, float], line: str, outcome: str, plan_of: Callable[..., Plan]
) -> None:
    runs = "runs: {a: {recipe: quickstart, settings: {train.epochs: 2}}, b: {recipe: quickstart}}"
    plan = plan_of(runs + claims(line.strip("{}")))

    def number(trial: Trial) -> tuple[float, ...]:  # seeds differ by far more than the runs do
        gain = difference[trial.seed] / 100 if trial.cell.run == "a" else 0
        return 0.2 + 0.5 * trial.seed + gain, 0.1

    verdict = filled(plan, number).verdicts()[0]
    assert verdict.pairs == 2
    assert verdict.difference.mean == pytest.approx(sum(difference) / 2)
    assert verdict.outcome == outcome
    equal = difference[0] == difference[1]  # but for rounding
    assert verdict.effect is None if equal else abs(verdict.effect) < 1e6


def test_a_claim_about_a_run_that_a_scale_leaves_out_is_not_made(
    plan_of: Callable[..., Plan],
) -> None:
    runs = "runs: {a: {recipe: quickstart, skip: true}, b: {recipe: quickstart}}"
    assert filled(plan_of(runs + claims("holds_if: less")), lambda t: (0.5, 0.5)).verdicts() == []


def test_only_the_measurement_asked_for_counts(plan_of: Callable[..., Plan]) -> None:
    runs = "runs: {b: {recipe: quickstart}}"
    results = filled(plan_of(runs), lambda t: (0.5, 0.4))
    assert results.values(results.plan.cells[0], "PGD (%)") == {0: 40.0, 1: 40.0}
    for override in (
        "evaluate.images=39",
        "evaluate.ids=[0, 1]",
        "evaluate.pgd.num_steps=2",
        "evaluate.pgd.restarts=2",
        "evaluate.pgd.step_size=0.25",
    ):
        other = Results(plan_of(runs, overrides=[override]), results.done)
        trial = other.plan.known(other.chosen)[0]
        assert other.done.left(trial) == [trial.commands[1]]  # not trained again
        results.done.add(trial, trial.commands[1], "done", 1.0)
        found = Results(other.plan, results.done)
        assert 0 not in found.values(found.plan.cells[0], "PGD (%)")


def test_a_list_of_images_that_changed_is_measured_anew(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    runs, path = "runs: {b: {recipe: quickstart}}", tmp_path / "list.txt"
    override = f"evaluate.ids={path}"
    with pytest.raises(RecipeError, match=r"evaluate.ids: .*list.txt.* is neither a readable"):
        plan_of(runs, overrides=[override])
    certified = "runs: {b: {recipe: quickstart, then: [[certify]]}}"
    with pytest.raises(RecipeError, match=r"certify.ids: .*list.txt.* is neither a readable"):
        plan_of(certified, overrides=["certify.sigma=0.1", f"certify.ids={path}"])
    path.write_text("".join(f"{i}\n" for i in range(50)))
    results = filled(plan_of(runs, overrides=[override]), lambda t: (0.5, 0.4))
    assert results.values(results.plan.cells[0], "PGD (%)") == {0: 40.0, 1: 40.0}
    path.write_text("".join(f"{i}\n" for i in range(1, 51)))
    other = Results(plan_of(runs, overrides=[override]), results.done)
    trial = other.plan.known(other.chosen)[0]
    assert [command[0] for command in other.done.left(trial)] == ["evaluate"]
    words = trial.arguments(other.done.left(trial)[0])
    assert f'evaluate.ids="{path}"' in words and not any("(" in word for word in words)
    other.done.add(trial, trial.commands[1], "done", 1.0)
    found = Results(other.plan, results.done)
    assert 0 not in found.values(found.plan.cells[0], "PGD (%)")


def test_held_out_accuracy_under_another_attack_is_none(plan_of: Callable[..., Plan]) -> None:
    results = filled(plan_of(TUNED), lambda t: (0.5, 0.4, 0.3))
    trial = results.plan.known(results.chosen)[0]
    run = results.run(trial)
    assert held_out(run, trial.recipe) == 30.0
    for override in ("evaluate.pgd.attack=apgd", "evaluate.pgd.loss=cw"):
        other = plan_of(TUNED, overrides=[override]).known(lambda cell: None)[0]
        assert held_out(run, other.recipe) is None


def test_the_page_has_table_figures_claims_and_how(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    text = (
        "runs: {a: {recipe: quickstart, label: 'A|1', about: {p x q: 1 x 6},"
        " published: {clean (%): 62.7}}, h: {recipe: quickstart, hidden: true}}\n"
        "grid: {size: {label: images, values: {80: {data.train_size: 80}, 160: {}}}}\n"
        "columns: {clean (%): clean, s: seconds, MB: megabytes}\n"
        "published_of: ResNet-50, another data set\n"
        "figures: [{name: curve, title: A curve, x: size, y: [clean (%)], log: true}]\n"
        "claims: [{text: t, run: 'a, last', than: 'a, first', columns: [clean (%)]}]"
    )
    results = filled(plan_of(text), lambda t: (0.5 + 0.1 * t.seed, 0.5))
    head = table(results).head
    assert list(head) == ["run", "images", "p x q", "clean (%)", "clean (%), published", "s", "MB"]
    page = write_page(results, tmp_path / "out", "s", "robust-accel study s")
    said = page.read_text()
    assert "Published figures: ResNet-50, another data set." in said
    assert "| A\\|1 | 80" in said and "55.00 ± 63.53" in said and "| 62.7 " in said
    assert "| h " not in said.split("## Claims")[0]
    assert "![A curve](curve.png)" in said and "robust-accel study s" in said
    for name in ("curve.png", "curve.svg", "s.json"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    row = json.loads((tmp_path / "out/s.json").read_text())["rows"][0]
    assert row["values"]["clean (%)"] == {"0": 50.0, "1": 60.0}


@pytest.mark.parametrize(("processes", "expected"), [(1, False), (2, True)])
def test_one_process_measures_no_communication(
    plan_of: Callable[..., Plan], processes: int, expected: bool
) -> None:
    report = {
        "num_processes": processes,
        "comm_seconds_per_epoch": 0.0,
        "comm_exposed_seconds_per_epoch": 0.0,
        "bytes_sent_per_step": 0.0,
        "train_seconds_per_epoch": 1.0,
    }
    run = Run(RunFolder("x"), "x", report, [])
    recipe = plan_of(TUNED).known(lambda cell: ())[0].recipe
    for name in ("communication", "exposed_communication", "megabytes"):
        assert measure(name, run, recipe) == (0.0 if expected else None)
    assert measure("seconds", run, recipe) == 1.0


def test_seconds_are_those_after_the_first_line_of_the_log(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    def line(step: int, speed: float, sent: float, waited: float) -> dict[str, float]:
        about = {"comm_seconds": sent, "comm_exposed_seconds": waited}
        return {"step": step, "loss": 1.0, "images_per_second": speed, **about}

    report = {
        "num_processes": 2,
        "comm_seconds_per_epoch": 15.0,
        "comm_exposed_seconds_per_epoch": 11.0,
        "train_seconds_per_epoch": 60.0,
    }
    # an epoch is ten steps: five that start, ten that run five times as fast
    lines = [line(5, 10.0, 20.0, 16.0), line(15, 50.0, 22.5, 16.5)]
    lines.insert(1, {"step": 10, "validation_robust_accuracy": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    run = Run(RunFolder(tmp_path), "x", report, [])
    recipe = plan_of(TUNED).known(lambda cell: ())[0].recipe
    assert measure("communication", run, recipe) == pytest.approx(2.5)
    assert measure("exposed_communication", run, recipe) == pytest.approx(0.5)
    # 5 steps take 5/10 units and 10 take 10/50, in all 7/150 a step, later on 3/150
    assert measure("seconds", run, recipe) == pytest.approx(60 * 3 / 7)


def test_drawn_test_images_are_all_that_there_are(plan_of: Callable[..., Plan]) -> None:
    runs = "runs: {b: {recipe: quickstart}}"
    drawn = ["data.test_size=50", "evaluate.images=null"]
    results = filled(plan_of(runs, overrides=drawn), lambda t: (0.5, 0.4))
    assert results.values(results.plan.cells[0], "PGD (%)") == {0: 40.0, 1: 40.0}


def test_a_folder_that_was_deleted_is_made_anew_with_all_that_follows(
    plan_of: Callable[..., Plan],
) -> None:
    runs = "runs: {b: {recipe: quickstart, then: [[pseudo-label, --out, '{run}/p.parquet']]}}"
    plan = plan_of(runs)
    plan.root.mkdir()
    done = Done(plan.root)
    trial = plan.known(lambda cell: None)[0]
    leave(trial, done, 0.5, 0.4)
    done.add(trial, trial.commands[2], "done", 1.0)
    assert done.left(trial) == []
    shutil.rmtree(trial.folder)
    assert [c[0] for c in done.left(trial)] == ["train", "pseudo-label"]
    leave(trial, done, 0.5, 0.4)
    assert [c[0] for c in Done(plan.root).left(trial)] == ["pseudo-label"]


@pytest.mark.parametrize("run", ["a", "b"])
@pytest.mark.parametrize("lost", [1, 3])
def test_seeds_that_were_not_finite_are_counted_and_decide_no_claim(
    plan_of: Callable[..., Plan], run: str, lost: int
) -> None:
    """What is left of a run flatters it, on either side of a claim."""
    runs = "runs: {a: {recipe: quickstart, settings: {train.epochs: 2}}, b: {recipe: quickstart}}"
    plan = plan_of(runs + claims("holds_if: greater"), seeds=range(3))
    plan.root.mkdir()
    done = Done(plan.root)
    for trial in plan.known(lambda cell: None):
        if trial.cell.run == run and trial.seed >= 3 - lost:
            done.add(trial, ("train",), "not finite", 1.0)
        else:
            leave(trial, done, 0.9 if trial.cell.run == run else 0.5, 0.4)
    results = Results(plan, done)
    assert results.verdicts()[0].outcome == ("open" if lost == 1 else "not measured")
    text = f"{lost} of 3 not finite"
    row = next(line for line in table(results).markdown().splitlines() if f"| {run} " in line)
    assert row.count(f"({text})" if lost == 1 else f"| {text}") == len(plan.study.columns)
    rows = as_json(results, [], "")["rows"]
    assert [one["lost"] for one in rows if one["run"] == run] == [text]
    assert results.missing() == []


CHANGES: dict[str, Callable[[dict], object]] = {
    "a row without a number": lambda report: report["measurements"][0].pop("accuracy"),
    "a row of another kind": lambda report: report["measurements"][0].update(attack=["none"]),
    "a list": lambda report: report.update(best_against_last=[1]),
    "a word": lambda report: report["best_against_last"].update(last="much", best="much"),
    "a mapping": lambda report: report.update(train_seconds_per_epoch={"a": 1}),
    "versions": lambda report: report.update(versions=["torch"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_report_of_another_shape_is_refused_by_its_folder(
    plan_of: Callable[..., Plan], tmp_path: Path, name: str
) -> None:
    text = f"{TUNED}\ncolumns: {{c: clean, h: held_out, s: seconds}}"
    results = filled(plan_of(text, seeds=range(1)), lambda t: (0.5, 0.5))
    trial = results.trials(results.plan.cells[1])[0]
    path = trial.folder / "report.json"
    report = json.loads(path.read_text())
    CHANGES[name](report)
    path.write_text(json.dumps(report))
    fresh = Results(results.plan, Done(results.plan.root))
    with pytest.raises(ValueError, match=f"^{trial.folder}"):
        write_page(fresh, tmp_path / "page", "study", "")


def test_published_figures_are_of_something_only_where_a_row_has_one(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    text = (
        "runs: {a: {recipe: quickstart, published: {clean (%): 62.7}}}\n"
        "published_of: another network"
    )
    for without, scales in ((False, TINY), (True, f"{TINY}    runs: {{a: {{published: {{}}}}}}\n")):
        results = filled(plan_of(text, scales=scales), lambda t: (0.5, 0.5))
        page = write_page(results, tmp_path / "out", "s", "").read_text()
        assert ("another network" not in page) == without


def test_what_trainings_were_made_on_and_with_is_told_of_each(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = plan_of("runs: {b: {recipe: quickstart}}", seeds=range(3))
    plan.root.mkdir()
    results = Results(plan, Done(plan.root))
    for trial in plan.known(results.chosen):
        where = "a card" if trial.seed else "a processor"
        with_torch = {"torch": str(trial.seed), "timm": "1"}
        leave(trial, results.done, 0.5, 0.5, hardware=where, versions=with_torch)
    page = write_page(results, tmp_path / "out", "s", "").read_text()
    assert "on a processor (1 of 3 trainings); a card (2 of 3 trainings); torch 0 (1 of 3" in page
    assert ", timm 1," in page
    found = json.loads((tmp_path / "out/s.json").read_text())["trainings"]
    assert [(one["hardware"], one["versions"]) for one in found] == [
        ("a processor", "torch 0, timm 1"),
        ("a card", "torch 1, timm 1"),
        ("a card", "torch 2, timm 1"),
    ]
