"""A run folder takes one run: nothing in it is mixed with another, nor lost."""

import json
from pathlib import Path

import pytest

from robust_accel.files import append_line
from robust_accel.locks import OWNER
from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder, differences, with_new_defaults


def test_a_new_or_empty_folder_is_free(tmp_path: Path) -> None:
    for resume in (False, True):
        assert not RunFolder(tmp_path / "new").check(resume=resume)
        assert not RunFolder(tmp_path).check(resume=resume)
    assert not (tmp_path / "new").exists()  # checking makes nothing
    (tmp_path / OWNER).touch()  # of this run, or of one that was killed
    assert not RunFolder(tmp_path).check(resume=False)


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_files_are_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"^output: .* holds files that are no run"):
        RunFolder(tmp_path).check(resume=resume)
    with pytest.raises(ValueError, match=r"^output: .* is no folder"):
        RunFolder(tmp_path / "thesis.tex").check(resume=resume)


def test_a_run_is_continued_only_when_asked(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.recipe.touch()
    with pytest.raises(ValueError, match=r"^output: .* already holds a run: --resume"):
        folder.check(resume=False)
    assert folder.check(resume=True)


def test_differences_name_keys_and_values() -> None:
    old = {"train": {"seed": 0, "epochs": 2}, "attack": {"eps": 0.2}}
    new = {"train": {"seed": 7, "epochs": 2}, "attack": None}
    assert list(differences(old, new).values()) == [
        "attack: {'eps': 0.2}, now None",
        "train.seed: 0, now 7",
    ]
    assert list(differences(old, new)) == ["attack", "train.seed"]


def test_settings_that_an_earlier_version_did_not_know_are_at_their_defaults() -> None:
    old = {"train": {"epochs": 1, "awp": None}, "output": "a"}
    new = {"train": {"epochs": 1, "awp": {"gamma": 0.1, "q": 2}, "new": 3, "other": 4}, "data": {}}
    filled = with_new_defaults(old, new, {"train": {"epochs": 1, "awp": {}, "other": 4}})
    assert filled == {"train": {"epochs": 1, "awp": None, "new": 3}, "output": "a", "data": {}}
    assert differences(filled, new).keys() == {"output", "train.awp", "train.other"}


def test_settings_in_a_list_that_an_earlier_version_did_not_know_are_at_their_defaults() -> None:
    old, new = {"a": [{"p": 1}, {"p": 2}]}, {"a": [{"p": 1, "q": 0}, {"p": 2, "q": 3}]}
    filled = with_new_defaults(old, new, {"a": [{"p": 1}, {"p": 2, "q": 3}]})
    assert filled == {"a": [{"p": 1, "q": 0}, {"p": 2}]}
    longer = {"a": [*new["a"], {"p": 4, "q": 0}]}
    assert with_new_defaults(old, longer, longer) == old
    tuned = load_recipe("quickstart", ["data.unlabeled=[{path: a.npz, fraction: 0.25}]"])
    assert tuned.chosen["data"]["unlabeled"] == [{"path": "a.npz", "fraction": 0.25}]


def test_only_named_steps_are_checkpoints_and_the_newest_is_last(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.steps() == []
    names = ["step-00000003", "step-00000020", "step-00000100", "step-123456789"]
    others = ["incomplete", "step-backup", "step-00000200-copy", "damaged-step-00000300", "step-"]
    for name in [*reversed(names), *others]:
        (folder.checkpoints / name).mkdir(parents=True)
    folder.best.write_bytes(b"")
    assert [path.name for path in folder.steps()] == names


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
