"""What a study starts, and with what."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from studies.conftest import leave

from robust_accel.exit_codes import STOPPED
from robust_accel.studies import execution
from robust_accel.studies.execution import UNFINISHED, Done, Runner
from robust_accel.studies.plan import Plan
from robust_accel.studies.results import Results

RUNS = (f"r{n}: {{recipe: quickstart, settings: {{attack.num_steps: {n + 1}}}}}" for n in range(4))
FOUR = f"runs: {{{', '.join(RUNS)}}}"


def test_rows_of_one_training_have_each_its_own_measured(plan_of: Callable[..., Plan]) -> None:
    words = "pseudo-label, --data, 'sklearn:digits', --out, '{run}/p.parquet'"
    plan = plan_of(
        f"runs: {{a: {{recipe: quickstart}}, teacher: {{recipe: quickstart, then: [[{words}]]}},"
        " certified: {recipe: quickstart, then: [[certify]]}, student: {recipe: quickstart,"
        " settings: {data.unlabeled: {path: '{teacher}/p.parquet'}}}}",
        seeds=range(1),
        overrides=["certify.sigma=0.5"],
    )
    runner = Runner(plan, Done(plan.root), jobs=4, launcher=None)
    begun = []
    while (waiting := runner._waiting(lambda cell: ())) and len(begun) < 9:
        assert len({trial.folder for trial, _ in waiting}) == len(waiting)
        for trial, command in waiting:
            begun.append((trial.cell.run, command[0]))
            if command == ("train",):
                leave(trial, runner.done, 0.5, 0.5)
            runner.done.add(trial, command, "done", 1.0)
    last = ("student", "train")
    assert begun == [("a", "train"), ("teacher", "pseudo-label"), ("certified", "certify"), last]


def test_only_what_was_tuned_to_is_measured_further(plan_of: Callable[..., Plan]) -> None:
    tune = "tune: {optimizer.lr: [0.1, 0.2, 0.3]}"
    text = f"runs: {{a: {{recipe: quickstart, then: [[certify]], {tune}}}}}"
    plan = plan_of(text, overrides=["certify.sigma=0.5"])
    runner = Runner(plan, Done(plan.root), jobs=4, launcher=None)
    results, begun = Results(plan, runner.done), []
    while (waiting := runner._waiting(results.chosen)) and len(begun) < 9:
        for trial, command in waiting:
            rate = dict(trial.tried)["optimizer.lr"]
            begun.append((rate, trial.seed, command[0]))
            if command == ("train",):
                leave(trial, runner.done, 0.5, 0.5, 0.4 if rate == 0.2 else 0.3)
            else:
                runner.done.add(trial, command, "done", 1.0)
    first = [(rate, 0, "train") for rate in (0.1, 0.2, 0.3)]
    assert begun == [*first, (0.2, 0, "certify"), (0.2, 1, "train"), (0.2, 1, "certify")]
    assert not results.missing()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The environments of what is started; each ends as if by SIGTERM once all four have been."""
    environments: list[dict[str, str]] = []

    def start(_: object, env: dict[str, str], **__: Any) -> SimpleNamespace:
        environments.append(env)
        return SimpleNamespace(
            poll=lambda: STOPPED if len(environments) == 4 else None, returncode=STOPPED
        )

    monkeypatch.setattr(execution.subprocess, "Popen", start)
    return environments


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, ["0", "1", "2", "0"]), ("5,7", ["5", "7", "5", "7"]), ("3", ["3"] * 4)],
)
def test_trainings_are_spread_over_gpus(
    visible: str | None,
    expected: list[str],
    started: list[dict[str, str]],
    plan_of: Callable[..., Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(execution.torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    plan = plan_of(FOUR, seeds=range(1))
    Runner(plan, Done(plan.root), jobs=4, launcher=None).run(lambda cell: ())
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in started] == expected


def test_a_training_that_was_stopped_is_not_called_failed(
    started: list[dict[str, str]], plan_of: Callable[..., Plan], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    plan = plan_of(FOUR, seeds=range(1))
    runner = Runner(plan, Done(plan.root), jobs=4, launcher=None)
    runner.run(lambda cell: ())
    assert len(started) == 4 and len(runner.broken) == 4
    told = [text for text in caplog.messages if "was stopped" in text]
    assert len(told) == 4 and all("the same command goes on" in text for text in told)


def test_no_log_is_written_through_a_link(
    started: list[dict[str, str]], plan_of: Callable[..., Plan], tmp_path: Path
) -> None:
    plan, victim = plan_of(FOUR, seeds=range(1)), tmp_path / "victim"
    victim.write_text("mine")
    folder = plan.known(lambda cell: ())[0].folder
    folder.parent.mkdir()
    folder.with_name(f"{folder.name}.log").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        Runner(plan, Done(plan.root), jobs=1, launcher=None).run(lambda cell: ())
    assert victim.read_text() == "mine" and not started


def test_the_time_left_is_by_work_and_with_what_was_stopped(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(FOUR, seeds=range(1))  # of 2, 3, 4 and 5 passes an image
    chosen, done = lambda cell: (), Done(plan.root)
    first = plan.known(chosen)[0]
    first.folder.mkdir(parents=True)
    (first.folder / "report.json").write_text("{}")
    done.add(first, ("train",), UNFINISHED, 15.0)
    assert ("train",) in done.left(first)
    done.add(first, ("train",), "done", 5.0)
    for known in (done, Done(plan.root)):
        runner = Runner(plan, known, jobs=1, launcher=None)
        assert runner._outlook(chosen) == "1 of 4 done, about 2 min left"
