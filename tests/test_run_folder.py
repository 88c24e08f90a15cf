"""A run folder takes one run: nothing in it is mixed with another, nor lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from robust_accel.files import append_line
from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder

SETTINGS: dict[str, Any] = {"train": {"epochs": 2}, "output": "here"}


@pytest.fixture
def started(tmp_path: Path) -> RunFolder:
    """A folder where a run of the quickstart recipe was started."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    load_recipe("quickstart").save(folder.recipe)
    return folder


def quickstart(*overrides: str) -> dict[str, Any]:
    return load_recipe("quickstart", overrides).settings


def test_a_new_or_empty_folder_is_free(tmp_path: Path) -> None:
    for resume in (False, True):
        assert not RunFolder(tmp_path / "new").check(SETTINGS, resume=resume)
        assert not RunFolder(tmp_path).check(SETTINGS, resume=resume)
    assert not (tmp_path / "new").exists()  # checking makes nothing


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_files_are_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"^output: .* holds files that are no run"):
        RunFolder(tmp_path).check(SETTINGS, resume=resume)
    with pytest.raises(ValueError, match=r"^output: .* is no folder"):
        RunFolder(tmp_path / "thesis.tex").check(SETTINGS, resume=resume)


def test_a_run_is_continued_only_when_asked(started: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"^output: .* already holds a run: --resume"):
        started.check(quickstart(), resume=False)
    assert not started.check(quickstart(), resume=True)  # nothing was saved yet: start again
    (started.checkpoints / "step-00000004").mkdir(parents=True)
    assert started.check(quickstart(), resume=True)


def test_other_settings_are_named_with_both_values(started: RunFolder) -> None:
    other = quickstart("train.seed=7", "attack.eps=0.1", "schedule.name=constant")
    with pytest.raises(ValueError, match="started with other settings") as refused:
        started.check(other, resume=True)
    message = str(refused.value)
    assert "train.seed: 0, now 7" in message
    assert "attack.eps: 0.2, now 0.1" in message
    assert "schedule.name: 'onecycle', now 'constant'" in message
    assert "train.epochs" not in message


def test_a_run_may_be_moved_and_measured_otherwise(started: RunFolder) -> None:
    (started.checkpoints / "step-00000004").mkdir(parents=True)
    other = quickstart("output=elsewhere", "evaluate.eps=0.1", "evaluate.autoattack=standard")
    assert started.check(other, resume=True)


def test_settings_compare_as_they_were_saved(started: RunFolder) -> None:
    """A user's dataclass may hold tuples; YAML has lists."""
    started.recipe.write_text("attack: {window: [1, 2]}")
    assert not started.check({"attack": {"window": (1, 2)}}, resume=True)
    with pytest.raises(ValueError, match=r"attack\.window: \[1, 2\], now \[1, 3\]"):
        started.check({"attack": {"window": (1, 3)}}, resume=True)


def test_only_whole_checkpoints_count_and_the_newest_is_last(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.steps() == []
    for name in ("step-00000100", "step-00000020", "incomplete", "step-00000003"):
        (folder.checkpoints / name).mkdir(parents=True)
    folder.best.write_bytes(b"")
    names = [path.name for path in folder.steps()]
    assert names == ["step-00000003", "step-00000020", "step-00000100"]


def test_metrics_are_cut_where_the_run_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_metrics() == []
    folder.truncate_metrics(0)
    lines = [{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)]
    for line in lines:
        append_line(folder.metrics, line)
    assert folder.read_metrics() == lines
    folder.truncate_metrics(2)
    assert folder.read_metrics() == lines[:2]
    append_line(folder.metrics, {"step": 3})
    assert folder.read_metrics() == [*lines[:2], {"step": 3}]


def test_a_line_that_a_killed_run_left_half_written_is_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append_line(folder.metrics, {"step": 1})
    with folder.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    assert folder.read_metrics() == [{"step": 1}]
    folder.truncate_metrics(5)
    append_line(folder.metrics, {"step": 2})
    assert folder.read_metrics() == [{"step": 1}, {"step": 2}]


def test_the_report_is_replaced_whole(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read_report() == {}
    folder.write_report({"a": 1})
    with pytest.raises(TypeError):
        folder.write_report({"b": object()})
    assert folder.read_report() == {"a": 1}
    folder.write_report({"b": [2.5]})
    assert json.loads(folder.report.read_text()) == {"b": [2.5]}
