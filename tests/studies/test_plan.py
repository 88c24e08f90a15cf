"""A training is known by its settings: shared where they are equal, another where they are not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from studies.conftest import leave

from robust_accel.plain_yaml import RecipeError
from robust_accel.recipe import SECTIONS, TrainSettings
from robust_accel.studies.after import left_behind
from robust_accel.studies.execution import Done
from robust_accel.studies.plan import Plan
from robust_accel.training.start import CHOOSING

TWO = "runs: {a: {recipe: quickstart}, b: {recipe: quickstart, settings: {attack.num_steps: 2}}}"


def first(plan: Plan) -> Callable[..., object]:
    return lambda cell: plan.tries(cell)[0]


def trials(plan: Plan) -> dict[str, object]:
    return {trial.name: trial for trial in plan.known(first(plan))}


def test_a_run_a_cell_a_combination_a_seed(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(
        "runs: {a: {recipe: quickstart,"
        " tune: {optimizer.lr: [0.1, 0.2], train.batch_size: [32, 64]}},"
        " b: {recipe: quickstart, grid: []}}\n"
        "grid: {size: {label: size, values: {80: {data.train_size: 80}, 160: {}}}}"
    )
    # a: two cells of four combinations and one more seed; b: one of each seed
    assert plan.number == 2 * (4 + 1) + 2
    names = list(trials(plan))
    assert "a, 80, lr=0.1, batch_size=32, seed 0" in names
    assert "a, 80, lr=0.2, batch_size=64, seed 1" not in names
    assert names[-1] == "b, seed 1"
    recipe = trials(plan)["a, 80, lr=0.1, batch_size=32, seed 1"].recipe
    assert (recipe.data.train_size, recipe.train.batch_size, recipe.train.seed) == (80, 32, 1)


def test_seeds_wait_for_what_is_tuned(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("runs: {a: {recipe: quickstart, tune: {optimizer.lr: [0.1, 0.2]}}}")
    assert {t.seed for t in plan.known(lambda cell: None)} == {0}
    best = (("optimizer.lr", 0.2),)
    assert {t.tried for t in plan.known(lambda cell: best) if t.seed == 1} == {best}


def test_settings_lie_over_one_another_the_command_line_last(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    (tmp_path / "over.yaml").write_text("train: {batch_size: 1, epochs: 2, log_every: 3}\n")
    scales = "scales: {tiny: {base: over.yaml, settings: {train.batch_size: 2, train.epochs: 4}}}"
    text = "runs: {a: {recipe: quickstart, settings: {train: {epochs: 5}}}}"
    train = plan_of(text, scales=scales).known(lambda cell: None)[0].recipe.train
    assert (train.batch_size, train.epochs, train.log_every) == (2, 5, 3)
    train = (
        plan_of(text, scales=scales, overrides=["train.epochs=7"])
        .known(lambda c: None)[0]
        .recipe.train
    )
    assert train.epochs == 7


def test_what_weights_do_not_depend_on_changes_no_digest(plan_of: Callable[..., Plan]) -> None:
    def digests(*overrides: str) -> list[str]:
        return [t.digest for t in trials(plan_of(TWO, overrides=overrides)).values()]

    before = digests()
    assert len(set(before)) == 4
    assert digests("evaluate.images=20", "evaluate.pgd.num_steps=7", "certify.n=200") == before
    for override in (
        "optimizer.lr=0.3",
        "train.epochs=2",
        "evaluate.eps=0.1",
        "data.train_size=99",
    ):
        assert not set(digests(override)) & set(before), override
    two = plan_of(TWO.replace("quickstart}", "quickstart, processes: 2}"))
    assert set(before) & {t.digest for t in trials(two).values()} == set(before[1::2])


def test_what_chooses_weights_while_they_are_trained_is_another_training(
    plan_of: Callable[..., Plan],
) -> None:
    ball = "{norm: linf, eps: 0.2}"
    others = {
        "norm": ["evaluate.norm=l2", "evaluate.eps=1"],
        "eps": ["evaluate.eps=0.1"],
        "balls": [f"evaluate.balls=[{ball}, {ball.replace('linf', 'l2')}]"],
        "pgd.attack": ["evaluate.pgd.attack=apgd"],
        "pgd.loss": ["evaluate.pgd.loss=cw"],
        "seed": ["evaluate.seed=1"],
        "batch_size": ["evaluate.batch_size=10"],
    }
    assert {f"evaluate.{key}" for key in others} == set(CHOOSING)
    before = {t.digest for t in trials(plan_of(TWO)).values()}
    for overrides in others.values():
        found = plan_of(TWO, overrides=overrides)
        assert not {t.digest for t in trials(found).values()} & before, overrides


def test_an_axis_may_set_the_number_of_processes(plan_of: Callable[..., Plan]) -> None:
    grid = "grid: {n: {label: n, values: {1: {}, 2: {data.train_size: 80, processes: 2}}}}"
    plan = plan_of(f"runs: {{a: {{recipe: quickstart}}}}\n{grid}")
    assert {n: t.processes for n, t in trials(plan).items()} == {
        f"a, {n}, seed {seed}": n for n in (1, 2) for seed in (0, 1)
    }
    with pytest.raises(RecipeError, match=r"grid\.n\.values\.2: .*0"):
        plan_of(
            f"runs: {{a: {{recipe: quickstart}}}}\n{grid.replace('processes: 2', 'processes: 0')}"
        )


def test_a_scale_adds_to_what_a_run_sets(plan_of: Callable[..., Plan]) -> None:
    runs = "runs: {a: {recipe: quickstart, settings: {attack: {name: n-fgsm, eps: 0.2}}}}"
    for more in ("attack.eps: 0.1", "attack: {eps: 0.1}"):
        scales = f"scales: {{tiny: {{runs: {{a: {{settings: {{{more}}}}}}}}}}}"
        attack = trials(plan_of(runs, scales=scales))["a, seed 0"].recipe.settings["attack"]
        assert (attack["name"], attack["eps"]) == ("n-fgsm", 0.1)


def test_rows_that_are_one_training_are_refused(plan_of: Callable[..., Plan]) -> None:
    runs = "runs: {a: {recipe: quickstart, settings: {attack: {name: n-fgsm}}}}\n"
    grid = "grid: {eps: {label: eps, values: {1: {attack.eps: 0.1}, 2: {attack.eps: 0.2}}}}"
    with pytest.raises(RecipeError, match=r"runs\.a: a, 2 is the very training of a, 1$"):
        plan_of(runs + grid)
    assert plan_of(runs.replace("{attack: {name: n-fgsm}}", "{}") + grid)
    with pytest.raises(RecipeError, match=r"runs\.b: b is the very training of a$"):
        plan_of(TWO, overrides=["attack.num_steps=3"])
    for name in "ab":
        hidden = TWO.replace(f"{name}: {{", f"{name}: {{hidden: true, ")
        assert plan_of(hidden, overrides=["attack.num_steps=3"])


def test_a_batch_that_its_processes_cannot_share_is_refused(plan_of: Callable[..., Plan]) -> None:
    runs = "runs: {a: {recipe: quickstart, processes: 3}}"
    with pytest.raises(RecipeError, match=r"runs\.a: train\.batch_size: 64 is not divisible by 3 "):
        plan_of(runs)
    assert plan_of(runs, overrides=["train.batch_size=66"])


def test_new_settings_at_their_defaults_change_no_digest(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {t.digest for t in trials(plan_of(TWO)).values()}
    explicit = TWO.replace("quickstart}", "quickstart, settings: {train.attack_mode: eval}}")
    assert {t.digest for t in trials(plan_of(explicit)).values()} == before

    class Later(TrainSettings):
        invented: int = 3

    monkeypatch.setitem(SECTIONS, "train", Later)
    assert {t.digest for t in trials(plan_of(TWO)).values()} == before
    with_it = TWO.replace("quickstart}", "quickstart, settings: {train.invented: 4}}")
    assert not {t.digest for t in list(trials(plan_of(with_it)).values())[::2]} & before


def test_what_another_default_trained_is_not_taken(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(TWO)
    done = Done(plan.root)
    for trial in plan.known(first(plan)):
        leave(trial, done, 0.9, 0.5)
        trial.recipe.save(trial.folder / "recipe.yaml")
        assert Done(plan.root).left(trial) == []
    stored = trial.folder / "recipe.yaml"
    text = stored.read_text()
    stored.write_text(text.replace("attack_mode: eval", "attack_mode: train"))
    with pytest.raises(RecipeError, match=r"recipe.yaml: train.attack_mode: 'train', now 'eval'"):
        Done(plan.root).left(trial)
    stored.write_text(text.replace("  attack_mode: eval\n", ""))  # an earlier version
    assert Done(plan.root).left(trial) == []


@pytest.mark.parametrize(
    "setting", ["pgd.num_steps=50", "pgd.restarts=2", "sweep.eps=[0.1]", "corruptions={images: 9}"]
)
def test_what_was_measured_otherwise_is_only_measured(
    plan_of: Callable[..., Plan], setting: str
) -> None:
    """Whichever came first; unless by what chose the weights."""
    for first_by, then_by in ([f"evaluate.{setting}"], []), ([], [f"evaluate.{setting}"]):
        plan = plan_of(TWO, overrides=first_by)
        for trial in plan.known(first(plan)):
            leave(trial, Done(plan.root), 0.9, 0.5)
            trial.recipe.save(trial.folder / "recipe.yaml")
        then = plan_of(TWO, overrides=then_by)
        for trial in then.known(first(then)):
            assert Done(plan.root).left(trial) == [trial.commands[1]]
            shutil.rmtree(trial.folder)
        (plan.root / "done.jsonl").unlink()
    trial = plan_of(TWO).known(first(plan))[0]
    leave(trial, Done(plan.root), 0.9, 0.5)
    trial.recipe.save(trial.folder / "recipe.yaml")
    stored = trial.folder / "recipe.yaml"
    stored.write_text(stored.read_text().replace("    attack: pgd\n", "    attack: apgd\n"))
    with pytest.raises(RecipeError, match=r"evaluate\.pgd\.attack: 'apgd', now 'pgd'"):
        Done(plan.root).left(trial)


def test_equal_trainings_of_two_studies_are_one(plan_of: Callable[..., Plan]) -> None:
    own = trials(plan_of(TWO))["a, seed 0"]
    other = trials(plan_of("runs: {elsewhere: {recipe: quickstart}}"))["elsewhere, seed 0"]
    assert other.folder == own.folder
    clock = ["train.max_time=3h", "train.log_every=7", "data.num_workers=2"]
    assert trials(plan_of(TWO, overrides=clock))["a, seed 0"].folder == own.folder
    assert trials(plan_of(TWO, launcher="srun"))["a, seed 0"].folder != own.folder


@pytest.mark.parametrize(
    "override", ["train.seed=1", "optimizer.lr=1", "optimizer={name: sgd}", "data.train_size=9"]
)
def test_what_a_study_varies_is_not_set_for_all(
    override: str, plan_of: Callable[..., Plan]
) -> None:
    text = "runs: {a: {recipe: quickstart, tune: {optimizer.lr: [0.1, 0.2]}}}\n"
    text += "grid: {size: {label: size, values: {80: {data: {train_size: 80}}, 160: {}}}}"
    with pytest.raises(RecipeError, match=r"command line: .*: the study itself varies"):
        plan_of(text, overrides=[override])


def test_a_run_starts_from_another_of_its_seed_and_cell(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(
        "runs: {a: {recipe: quickstart, then: [[pseudo-label, --out, '{run}/p.parquet']]},"
        " b: {recipe: quickstart, settings: {model.checkpoint: '{a}'}}}\n"
        "grid: {size: {label: size, values: {80: {data.train_size: 80}, 160: {}}}}"
    )
    found = trials(plan)
    for size in (80, 160):
        for seed in (0, 1):
            source = found[f"a, {size}, seed {seed}"]
            trial = found[f"b, {size}, seed {seed}"]
            assert trial.needs == (source.folder,)
            assert trial.recipe.model.checkpoint == str(source.folder)
    changed = trials(plan_of((plan.path.read_text()).split("\nscales")[0].removeprefix(
        "title: A study\n").replace("p.parquet", "q.parquet")))  # fmt: skip
    assert changed["a, 80, seed 0"].digest == found["a, 80, seed 0"].digest
    assert changed["b, 80, seed 0"].digest != found["b, 80, seed 0"].digest


def test_folders_may_move_without_other_digests(
    plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    text = "runs: {a: {recipe: quickstart}, b: {recipe: quickstart,"
    text += " settings: {model.checkpoint: '{a}'}}}"
    plan = plan_of(text)
    moved = Plan(plan.path, plan.study, plan.scale, tmp_path / "elsewhere", seeds=plan.seeds)
    assert [t.digest for t in trials(plan).values()] == [t.digest for t in trials(moved).values()]


def test_rounding_has_the_runs_seed(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of("runs: {a: {recipe: quickstart, settings: {communication.name: qsgd}}}")
    for trial in trials(plan).values():
        assert trial.recipe.settings["communication"]["seed"] == trial.seed


def test_a_certificate_by_other_settings_is_another_command(plan_of: Callable[..., Plan]) -> None:
    text = "runs: {a: {recipe: quickstart, then: [[certify]]}}"
    sigma = "certify.sigma=0.25"
    one, other = (
        trials(plan_of(text, overrides=[sigma, f"certify.n={n}"]))["a, seed 0"] for n in (200, 300)
    )
    assert one.digest == other.digest
    assert one.commands[:2] == other.commands[:2]
    assert one.commands[2] != other.commands[2]
    assert other.commands[2][0] == "certify" and "certify.n=300" in other.commands[2]


def test_what_a_command_has_left_in_its_run_is_known(plan_of: Callable[..., Plan]) -> None:
    words = "--data, images.parquet, --out, '{run}/p.parquet', data.unlabeled.split=test"
    then = f"[[pseudo-label, {words}], [certify, --trust]]"
    runs = f"runs: {{a: {{recipe: quickstart, then: {then}}}}}"
    plan = plan_of(runs, overrides=["certify.sigma=0.5"])
    trial = trials(plan)["a, seed 0"]
    found = [left_behind(trial, command) for command in trial.commands]
    assert found == [None, None, trial.folder / "p.parquet", None]


@pytest.mark.parametrize(
    ("measure", "settings"),
    [
        ("certified 0.25", "{certify: {sigma: 0.1, radii: [0.25]}}"),
        ("pgd eps 0.2", "{evaluate: {sweep: {eps: [0.2]}}}"),
        ("pgd num_steps 50", "{evaluate: {sweep: {num_steps: [50]}}}"),
        ("autoattack", "{evaluate: {autoattack: quick}}"),
        ("autoattack l2", "{evaluate: {norm: l2, eps: 0.2, autoattack: quick}}"),
        ("mce", "{evaluate: {corruptions: {names: [fog], reference: {fog: 0.5}}}}"),
        ("corruption_error", "{evaluate: {corruptions: true}}"),
        ("held_out", "{data: {validation_size: 20}}"),
    ],
)
def test_a_column_that_no_run_can_fill_is_refused(plan_of, measure: str, settings: str) -> None:
    """With the settings it can, in one of the rows."""
    own = (
        "a: {recipe: quickstart, then: [[certify]], settings: {certify: {sigma: 0.1, radii: [1]}}}"
    )
    more = f"b: {{recipe: quickstart, settings: {settings}, then: [[certify]]}}"
    more = more if "certify" in settings else more.replace(", then: [[certify]]", "")
    columns = f"columns: {{x: {measure}}}"
    without = ["data.validation_size=0"] if measure == "held_out" else []
    said = f"columns.x: {measure}: no run of this study measures it"
    if not without:
        plan_of(f"runs: {{{own}, {more}}}\n{columns}")
    with pytest.raises(RecipeError, match=said):
        plan_of(f"runs: {{{own}}}\n{columns}", overrides=without)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("[certify]", "certify: certify.sigma: missing: the objective has no sigma"),
        ("[certify, certify.sigma=0.5]", "certify: certify.sigma: the table shows the certificate"),
        ("[certify, certify.sgma=0.5]", r"certify: certify.sgma: unknown key \(did you mean"),
        ("[certify, certify.sigma=0.5, data.path]", "certify: data.path is not allowed; allowed"),
        ("[certify, certify.sigma=0.5, train.epochs=3]", "train.epochs: this command does not"),
        ("[evaluate, evaluate.eps=8/255, evaluate.norm=l3]", "evaluate: evaluate.norm: 'l3' is"),
        ("[pseudo-label, --out, '{run}/a.parquet', --trust]", "--trust is not allowed"),
        ("[evaluate, --out, x.parquet]", "evaluate: --out is not allowed"),
        ("[pseudo-label]", "pseudo-label: --out: missing: {run}/NAME.parquet or {run}/NAME.npz is"),
        ("[pseudo-label, --out]", "pseudo-label: --out: a value is wanted"),
        ("[pseudo-label, --out, all.parquet]", "--out: all.parquet: {run}/NAME.parquet or {run}"),
        ("[pseudo-label, --out, '{run}/a.csv']", "--out: {run}/a.csv: {run}/NAME.parquet or"),
    ],
)
def test_what_cannot_be_done_after_a_training_is_said_before_it(
    command: str, said: str, plan_of: Callable[..., Plan]
) -> None:
    with pytest.raises(RecipeError, match=rf"study\.yaml: runs\.a\.then: .*{said}"):
        plan_of(f"runs: {{a: {{recipe: quickstart, then: [{command}]}}}}")
