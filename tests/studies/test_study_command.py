"""Real studies of small trainings: killed, gone on with, told what is wrong."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from studies.conftest import TINY, filled, leave

from robust_accel.__main__ import main
from robust_accel.commands.study import _earlier
from robust_accel.exit_codes import STOPPED
from robust_accel.recipe import load_recipe
from robust_accel.reporting.views import read_runs
from robust_accel.studies.execution import CHANGED, Done, Runner
from robust_accel.studies.measures import measure
from robust_accel.studies.plan import Plan
from robust_accel.studies.results import Results

STUDY = """
runs:
  a:
    recipe: quickstart
    then: [[pseudo-label, --data, "sklearn:digits", --out, "{run}/p.parquet"]]
  b: {recipe: quickstart, settings: {model.checkpoint: "{a}"}}
"""


def start(path: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "robust_accel",
        "study",
        str(path),
        "--output",
        str(output),
        *more,
    ]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def trainings(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def until(condition: Callable[[], object], limit: float = 90) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


LONG = ("--seeds", "1", "train.epochs=40", "train.checkpoint_every=1")


def ended(number: signal.Signals, path: Path, output: Path) -> int:
    """The code of a study that is ended in the middle of its first training, and both are gone."""
    process = start(path, output, *LONG)
    until(lambda: list(output.glob("tiny/*/checkpoints/step-*")))
    children = trainings(process)
    os.kill(process.pid, number)
    process.wait(60)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    return process.returncode


@pytest.mark.long
def test_no_training_goes_on_without_its_study(
    study_of: Callable[..., Path], tmp_path: Path
) -> None:
    assert ended(signal.SIGKILL, study_of(STUDY), tmp_path / "out") == -signal.SIGKILL


@pytest.mark.long
def test_a_study_that_is_ended_goes_on(study_of: Callable[..., Path], tmp_path: Path) -> None:
    path, output = study_of(STUDY), tmp_path / "out"
    assert ended(signal.SIGTERM, path, output) == STOPPED
    process = start(path, output, *LONG)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert (
        "continuing" in max(output.glob("tiny/*.log"), key=lambda p: p.stat().st_size).read_text()
    )
    assert "2 of 2 done" in said
    found = json.loads((output / "tiny" / f"{path.parent.name}.json").read_text())
    assert found["missing"] == []
    lines = (output / "tiny/done.jsonl").read_text().splitlines()
    done = [(line["name"], line["command"].split()[0]) for line in map(json.loads, lines)]
    assert done[-2:] == [("b, seed 0", "train"), ("b, seed 0", "evaluate")]
    assert ("a, seed 0", "pseudo-label") in done
    assert next(output.glob("tiny/*/p.parquet")).exists()
    # what is there is not done again, and other measurements do not train again
    before = {p: p.stat().st_mtime_ns for p in output.glob("tiny/*/model/model.safetensors")}
    assert (
        main(["study", str(path), *LONG, "evaluate.pgd.num_steps=2", "--output", str(output)]) == 0
    )
    assert before == {
        p: p.stat().st_mtime_ns for p in output.glob("tiny/*/model/model.safetensors")
    }


@pytest.mark.long
def test_every_column_has_the_number_that_a_real_training_leaves(
    study_of: Callable[..., Path], tmp_path: Path
) -> None:
    columns = {
        "pgd": "pgd", "aa": "autoattack", "clean": "clean", "held out": "held_out",
        "at eps": "pgd eps 0.1", "at steps": "pgd num_steps 2", "s": "seconds",
        "steps": "steps", "certified": "certified 0.1", "corrupted": "corruption_error",
        "mce": "mce",
    }  # fmt: skip
    (tmp_path / "published").mkdir()
    snow = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 1), np.uint8)
    np.save(tmp_path / "published" / "snow.npy", snow)
    np.save(tmp_path / "published" / "labels.npy", np.arange(50) % 10)
    path = study_of(
        "runs: {a: {recipe: quickstart, then: [[certify]], settings: {evaluate: {autoattack: quick,"
        " autoattack_images: 8, pgd: {attack: apgd, loss: cw, restarts: 2},"
        " sweep: {eps: [0.1], num_steps: [2]},"
        f" corruptions: {{path: {tmp_path / 'published'}, names: [snow], images: 8,"
        " reference: {snow: 0.5}}},"
        " certify: {sigma: 0.1, n: 100, images: 8, radii: [0.1]}}}}\n"
        f"columns: {json.dumps(columns)}"
    )
    assert main(["study", str(path), "--output", str(tmp_path / "out"), "--seeds", "1"]) == 0
    found = json.loads((tmp_path / "out/tiny" / f"{path.parent.name}.json").read_text())
    (row,) = found["rows"]
    assert {name for name, by_seed in row["values"].items() if "0" in by_seed} == set(columns)
    assert row["values"]["mce"]["0"] == 2 * row["values"]["corrupted"]["0"]
    (recipe,) = (tmp_path / "out/tiny").glob("*/recipe.yaml")
    (run,) = read_runs([recipe.parent])
    for other in ("corruptions.images=9", "corruptions.reference.snow=0.25", "seed=1"):
        asked = load_recipe(recipe, [f"evaluate.{other}"])
        assert measure("corruption_error", run, asked) is None
    # as many images, others; or others' radii
    for other in ("skip=2", "skip=2 certify.images=4", "images=4", "radii=[0.1,0.2]"):
        words = [f"certify.{word.removeprefix('certify.')}" for word in other.split()]
        asked = load_recipe(recipe, words)
        assert measure("certified 0.1", run, asked) is None, other
    ids, of_images = "[3, 1]", ("clean", "pgd", "autoattack", "pgd eps 0.1", "pgd num_steps 2")
    others = [f"evaluate.ids={ids}", f"certify.ids={ids}", "evaluate.corruptions=false"]
    asked = load_recipe(recipe, others)
    assert {name: measure(name, run, asked) for name in (*of_images, "certified 0.1")} == (
        dict.fromkeys((*of_images, "certified 0.1"))
    )
    assert row["values"]["at eps"]["0"] >= row["values"]["pgd"]["0"]
    # a larger measurement, made later by hand, hides none that the study asks for
    more = ["evaluate.images=null", "evaluate.corruptions=false", "evaluate.autoattack=null"]
    assert main(["evaluate", str(recipe.parent), *more]) == 0
    words = ["--output", str(tmp_path / "out"), "--seeds", "1", "--table"]
    assert main(["study", str(path), *words]) == 0
    page = tmp_path / "out/tiny" / f"{path.parent.name}.json"
    assert json.loads(page.read_text())["rows"] == [row]


def test_the_page_says_the_whole_command(study_of: Callable[..., Path], tmp_path: Path) -> None:
    path, launcher = study_of("runs: {a: {recipe: quickstart}}"), "env A=1 python"
    more = ("--scale", "tiny", "--seeds", "1", "--launcher", launcher)
    words = ["study", str(path.parent), *more, "train.epochs=2"]
    assert main([*words, "--table", "--output", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/tiny" / f"{path.parent.name}.json").read_text())
    assert shlex.split(found["command"]) == ["robust-accel", *words]


def test_a_changed_recipe_is_told_until_it_is_trained(
    plan_of: Callable[..., Plan],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A table, or a run that was killed, does not forget it; seeds that wait for tuning neither."""

    def told() -> list[str]:
        """What was said of changed recipes since the last time, by the command or without it."""
        said = [*capsys.readouterr().err.splitlines(), *caplog.messages]
        caplog.clear()
        return [text.replace(f"{CHANGED}: ", "") for text in said if CHANGED in text]

    text = (
        "runs: {a: {recipe: quickstart, settings: {train.epochs: 1}, tune: {optimizer.lr: [1, 2]}},"
        " b: {recipe: quickstart}}"
    )
    scales = TINY.replace("tiny:", "runs:")
    plan = plan_of(text, "runs", scales=scales)
    filled(plan, lambda t: (0.5, 0.5, 0.1 * dict(t.tried).get("optimizer.lr", 0)))
    table = ["study", str(plan.path), "--table", "--output", str(tmp_path)]
    assert main(table) == 0 and not told()
    summary = tmp_path / "runs" / f"{plan.path.parent.name}.json"
    names = {line["name"] for line in json.loads(summary.read_text())["trainings"]}
    changed = plan_of(text.replace("epochs: 1", "epochs: 2"), "runs", scales=scales)
    first = ["a, lr=1, seed 0", "a, lr=2, seed 0"]
    for _ in range(2):
        assert main(table) == 0
        assert told() == [f"{name}: the table has no number of it yet" for name in first]
        found = json.loads(summary.read_text())
        assert {line["name"] for line in found["trainings"]} == {"b, seed 0", "b, seed 1"}
        assert {line["name"] for line in found["earlier"]} == names - {"b, seed 0", "b, seed 1"}
    results = Results(changed, Done(changed.root, _earlier(changed, summary.stem)))
    runner = Runner(changed, results.done, jobs=1, launcher=None)
    runner._waiting(results.chosen)
    assert told() == [f"{name}: it is trained anew" for name in first]
    for trial in changed.known(results.chosen)[:2]:
        leave(trial, results.done, 0.5, 0.5, 0.1 * dict(trial.tried)["optimizer.lr"])
    runner._waiting(results.chosen)
    assert told() == ["a, lr=2, seed 1: it is trained anew"]
    filled(changed, lambda t: (0.5, 0.5))
    assert main(table) == 0 and not told()
    assert json.loads(summary.read_text())["earlier"] == []


def test_a_row_that_can_never_be_trained_is_named(
    plan_of: Callable[..., Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "runs: {a: {recipe: quickstart, hidden: true},"
        " b: {recipe: quickstart, settings: {model.checkpoint: '{a}'}}}"
    )
    plan = plan_of(text, "runs", scales=TINY.replace("tiny:", "runs:"), seeds=range(1))
    plan.root.mkdir()
    Done(plan.root).add(plan.known(lambda cell: ())[0], ("train",), "not finite", 1.0)
    words = ["study", str(plan.path), "--output", str(tmp_path), "--seeds", "1"]
    assert main([*words, "--table"]) == 0
    assert main(words) == 1
    assert "not finished: b (what it starts from was not finite)" in capsys.readouterr().err


@pytest.mark.long
def test_one_that_fails_is_named_and_the_others_are_done(
    study_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study_of(
        "runs: {bad: {recipe: quickstart, settings: {data.path: no/such/folder}},"
        " b: {recipe: quickstart, settings: {model.checkpoint: '{bad}'}},"
        " good: {recipe: quickstart}}"
    )
    assert main(["study", str(path), "--output", str(tmp_path / "out"), "--seeds", "1"]) == 1
    said = capsys.readouterr()
    assert "failed: bad, seed 0: train failed with exit code 2, see " in said.err
    assert "not finished: bad; b" in said.err
    log = Path(said.err.rsplit("see ", 1)[1].strip())
    assert "no/such/folder" in log.read_text()
    assert "| good |" in said.out.replace("  ", " ")
    page = next((tmp_path / "out/tiny").glob("*.md")).read_text()
    assert "Not finished: bad; b." in page


@pytest.mark.long
def test_two_studies_do_not_run_in_one_folder(
    study_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = study_of("runs: {a: {recipe: quickstart}}"), tmp_path / "out"
    process = start(path, output, "--seeds", "1", "train.epochs=40")
    until(lambda: (output / "tiny/owner.lock").exists())
    assert main(["study", str(path), "--output", str(output)]) == 2
    assert "is in use by process" in capsys.readouterr().err
    process.terminate()
    process.wait(60)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no_such"], "no_such: no such study"),
        (["paper", "--scale", "huge"], "there is no 'huge'"),
        (["paper/table1", "train.epoks=3"], "train.epoks: unknown key"),
        (["paper/table1", "output=x"], "output: the study itself varies output"),
        (["paper/table1", "--seeds", "99999"], "trainings; a study has at most 10,000"),
        (["paper/table1", "--write", "/dev/null/x"], "--write: /dev/null is no folder"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_several_processes_are_started_by_the_launcher(
    study_of: Callable[..., Path], tmp_path: Path
) -> None:
    path = study_of(
        "runs: {a: {recipe: quickstart, processes: 2, settings: {communication.name: qsgd}}}"
    )
    assert main(["study", str(path), "--output", str(tmp_path / "out"), "--seeds", "1"]) == 0
    report = json.loads(next((tmp_path / "out/tiny").glob("*/report.json")).read_text())
    assert report["num_processes"] == 2 and report["bytes_sent_per_step"] > 0


def test_a_study_that_names_itself_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.yaml").write_text(f"title: t\nstudies: [../{other}]\n")
    assert main(["study", str(tmp_path / "a"), "--output", str(tmp_path / "out")]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "a/study.yaml: studies: it names itself" in said


def test_the_claims_of_all_on_one_page_and_a_fuller_page_is_kept(
    plan_of: Callable[..., Plan], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claim = "{text: More, run: b, than: a, columns: [PGD (%)]}"
    runs = "{a: {recipe: quickstart}, b: {recipe: quickstart, settings: {attack.eps: 0.1}}}"
    text = f"runs: {runs}\nclaims: [{claim}]"
    plan = plan_of(text, "runs", scales=TINY.replace("tiny:", "runs:"))
    filled(plan, lambda trial: (0.5, 0.5 + 0.1 * (trial.cell.run == "b") + 0.01 * trial.seed))
    group = tmp_path / "all"
    group.mkdir()
    (group / "study.yaml").write_text(f"title: All\nstudies: [../../{tmp_path.name}]\n")
    words = ["study", str(group), "--table", "--write", str(tmp_path / "docs"), "--output"]
    assert main([*words, str(tmp_path)]) == 0
    page, counted = (tmp_path / "docs/all.md").read_text(), "| 4         | 1     | "
    assert counted in page and counted in capsys.readouterr().out
    assert f"## [A study]({tmp_path.name}.md)" in page and "+10.00 [+10.00, +10.00]" in page
    assert (tmp_path / "runs/all.md").read_text() == page
    own = (tmp_path / "runs" / f"{tmp_path.name}.md").read_text()
    assert re.search(rf"\nrobust-accel study \S*/{tmp_path.name}\n", own)  # not that of all
    # where nothing is left of it, the page of what there was stays
    before = (tmp_path / "docs" / f"{tmp_path.name}.md").read_text()
    assert main([*words, str(tmp_path / "elsewhere")]) == 1
    assert "has 4 trainings, and here are 0: it is kept" in capsys.readouterr().err
    assert (tmp_path / "docs" / f"{tmp_path.name}.md").read_text() == before
    assert counted in (tmp_path / "docs/all.md").read_text()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--output", "~nobody_of_this_name/x", "nobody here has this name"),
        ("--output", "", "an empty text names no file"),
        ("--write", "x" * 300, "has at most 255 bytes"),
        ("--seeds", "9" * 12, "a whole number from 1 to"),
        ("--launcher", "no_such_program -n 3", "there is no program 'no_such_program'"),
        ("--launcher", "a 'b", "is no command"),
        ("--launcher", "", "is no command"),
    ],
)
def test_an_option_that_nothing_can_use_is_refused_by_name(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["study", "paper/table1", f"{option}={value}"])
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {option}: " in last and said in last
