"""A study file is checked whole before anything is trained: faults name the file and the key."""

from collections.abc import Callable
from pathlib import Path

import pytest

from robust_accel.plain_yaml import RecipeError
from robust_accel.recipe_file import RECIPES
from robust_accel.studies.plan import Plan
from robust_accel.studies.study_file import FILE, find_study, read_study

PACKAGED = sorted(str(path.parent.relative_to(RECIPES)) for path in RECIPES.rglob(FILE))
WITH_RUNS = [name for name in PACKAGED if not read_study(find_study(name), None)[0].studies]
SCALES = [
    (name, scale) for name in WITH_RUNS for scale in read_study(find_study(name), None)[0].scales
]


@pytest.mark.parametrize(("name", "scale"), SCALES)
def test_every_packaged_study_can_run_at_each_scale(name: str, scale: str, tmp_path: Path) -> None:
    path = find_study(name)
    plan = Plan(path, *read_study(path, scale), tmp_path)
    assert plan.number >= len(plan.cells) * 3
    assert len({trial.folder for trial in plan.known(lambda cell: plan.tries(cell)[0])}) > 1


def test_the_paper_is_all_of_its_tables_and_figures_at_the_scale_of_a_cpu() -> None:
    study, _ = read_study(find_study("paper"), None)
    wanted = {f"table{i}" for i in (1, 2, 3, 4)} | {f"figure{i}" for i in (1, 2, 3, 4, "A1")}
    assert wanted <= set(study.studies)
    assert all((f"paper/{name}", "cpu") in SCALES for name in wanted)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "runs: {a: {recipe: quickstart, tuna: {}}}",
            "runs.a.tuna: unknown key (did you mean tune?)",
        ),
        ("runs: {a: {}}", "runs.a.recipe: missing"),
        ("runs: {'a b': {recipe: quickstart}}", "runs"),
        (
            "runs: {a: {recipe: quickstart, then: [[wrap, x.py]]}}",
            "after a training there are certify",
        ),
        ("about: none", "either runs of its own or other studies"),
        (
            "runs: {a: {recipe: quickstart}}\ncolumns: {x: speed}",
            "'speed' is not allowed: a measure",
        ),
        ("runs: {a: {recipe: quickstart}}\ncolumns: {x: certified far}", "a finite number"),
        (
            "runs: {a: {recipe: quickstart, grid: [b]}}",
            "runs.a.grid: b is no axis; allowed: none",
        ),
        (
            "published_of: x\nruns: {a: {recipe: quickstart, published: {TA: 1}}}",
            "runs.a.published: TA is no column",
        ),
        (
            "runs: {a: {recipe: quickstart, published: {clean (%): 1}}}",
            "published_of: missing: of what are those of runs.a.published?",
        ),
        (
            "runs: {a: {recipe: quickstart}}\n"
            "claims: [{text: t, run: a, than: b, columns: [clean (%)]}]",
            "claims.0: b is no run",
        ),
        (
            "runs: {a: {recipe: quickstart}}\nfigures: [{name: f, title: t, x: size}]",
            "figures.f.x: size is no axis",
        ),
        (
            "runs: {a: {recipe: quickstart}}\n"
            "grid: {b: {label: b, values: {1: {}, 2: {}}}}\nfigures: [{name: f, title: t, x: b}]",
            "figures.f.y: missing",
        ),
        (
            "runs: {a: {recipe: quickstart}}\nfigures: [{name: f, title: t}]",
            "figures.f.y: missing",
        ),
        (
            "runs: {a: {recipe: quickstart}}\n"
            "figures: [{name: f, title: t, y: [clean (%)], log: true}]",
            "figures.f.log: bars have no x axis",
        ),
        (
            "runs: {a: {recipe: quickstart}}\n"
            "figures: [{name: f, title: t, x: eps, y: [clean (%)]}]",
            "figures.f.y: against eps accuracy is drawn",
        ),
    ],
)
def test_a_fault_names_file_and_key(text: str, said: str, study_of: Callable[..., Path]) -> None:
    path = study_of(text)
    with pytest.raises(RecipeError) as error:
        read_study(path, "tiny")
    assert said in str(error.value)
    assert all(line.startswith(f"{path}: ") for line in str(error.value).splitlines())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("runs: {a: {recipe: no_such}}", "runs.a.recipe: no such file: "),
        ("runs: {a: {recipe: quickstart, settings: {train.epoks: 3}}}", "train.epoks: unknown key"),
        ("runs: {a: {recipe: quickstart, settings: {train: 3, train.seed: 1}}}", "train is set to"),
        ("runs: {a: {recipe: quickstart, tune: {optimizer.lr: [0.1, fast]}}}", "optimizer.lr"),
        ("runs: {a: {recipe: quickstart, settings: {model.checkpoint: '{b}'}}}", "{b} is no run"),
        (
            "runs: {a: {recipe: quickstart, settings: {model.checkpoint: '{a}'}}}",
            "starts from itself",
        ),
        (
            "runs: {a: {recipe: quickstart, tune: {optimizer.lr: [1, 2]}, "
            "settings: {data.validation_size: 0}}}",
            "data.validation_size is 0",
        ),
        (
            "runs: {a: {recipe: quickstart}}\ngrid: {b: {label: b, values: {1: {}, 2: {}}}}\n"
            "claims: [{text: t, run: a, than: 'a, 1', columns: [clean (%)]}]",
            "'a' must name one row, got a, 1; a, 2",
        ),
        ("runs: {a: {recipe: quickstart, settings: {output: x}}}", "runs.a: output: the study"),
        ("runs: {a: {recipe: quickstart, settings: {train: {seed: 7}}}}", "train.seed: the study"),
        ("runs: {a: {recipe: quickstart, tune: {train.seed: [1, 2]}}}", "runs.a.tune: train.seed"),
        (
            "runs: {a: {recipe: quickstart, tune: {"
            + ", ".join(f"x{i}: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" for i in range(30))
            + "}}}",
            ",001 trainings; a study has at most 10,000",
        ),
    ],
)
def test_every_recipe_is_built_before_the_first_is_trained(
    text: str, said: str, plan_of: Callable[..., Plan]
) -> None:
    with pytest.raises(RecipeError) as error:
        plan_of(text)
    assert said in str(error.value)


def test_what_a_scale_changes_must_be_there(plan_of: Callable[..., Plan]) -> None:
    runs = "runs: {a: {recipe: quickstart}}"
    with pytest.raises(RecipeError, match=r"scales.tiny.runs: c is no run"):
        plan_of(runs, scales="scales: {tiny: {runs: {c: {}}}}")
    with pytest.raises(RecipeError, match=r"runs.a: lr: unknown key"):
        plan_of(runs, scales="scales: {tiny: {runs: {a: {lr: 3}}}}")
    with pytest.raises(RecipeError, match=r"there is no 'huge'; tiny are"):
        plan_of(runs, "huge")


def test_a_study_is_a_file_a_folder_or_a_name(study_of: Callable[..., Path]) -> None:
    path = study_of("runs: {a: {recipe: quickstart}}")
    assert find_study(str(path)) == find_study(str(path.parent)) == path
    assert find_study("paper/table1") == RECIPES / "paper/table1" / FILE
    with pytest.raises(
        RecipeError, match=r"no_such: no such study, nor a packaged one \(.*paper/table1"
    ):
        find_study("no_such")
