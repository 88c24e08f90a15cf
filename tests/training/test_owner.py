"""A run folder has one owner: one run at a time, and one process that decides for all."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from launching import CPU, SMALL, ZERO2, Forked, kill_at, weights

from robust_accel.evaluation.ledger import read_records
from robust_accel.locks import OWNER, locked
from robust_accel.run_folder import RunFolder

pytestmark = pytest.mark.launch

TINY = (*SMALL, "train.epochs=1", "train.max_steps=4", "evaluate.pgd=null", "evaluate.images=20")
TRAIN = ("train", "quickstart", *SMALL, "train.validate_every=1", "train.select=best")
RELATIVE = "output=run"


def content(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != OWNER)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_of_runs_that_start_at_once_one_wins(tmp_path: Path) -> None:
    for trial in range(3):
        folder = RunFolder(tmp_path / str(trial))
        arguments = ("train", "quickstart", *TINY, f"output={folder.path}", "--resume")
        both = [Forked(*arguments, num_processes=1, environment={}) for _ in range(2)]
        ends = [process.wait() for process in both]
        assert sorted(code for code, _ in ends) == [0, 2], ends
        (said,) = (output for code, output in ends if code == 2)
        assert "is in use by process " in said
        steps = [line["step"] for line in folder.read_metrics() if "loss" in line]
        assert steps == [4]
        assert len(read_records(folder.path)) == 1
        assert not (folder.path / OWNER).exists()


def test_no_command_writes_into_a_folder_in_use(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert Forked("train", "quickstart", *TINY, f"output={folder}").wait()[0] == 0
    before = content(folder)
    with locked(folder, print):
        for command in (
            ("train", "quickstart", *TINY, f"output={folder}", "--resume"),
            ("evaluate", folder, "evaluate.images=10"),
            ("certify", folder, "certify.images=1", "certify.sigma=0.1", "certify.n=10"),
        ):
            process = Forked(*command)
            code, output = process.wait()
            assert [p.exitcode for p in process.processes] == [2, 2], output
            assert code == 2
            assert output.count(f"output: {folder} is in use by process ") == 1
    assert content(folder) == before


@pytest.mark.parametrize(
    "environment", [CPU, pytest.param(ZERO2, marks=pytest.mark.long)], ids=["ddp", "zero2"]
)
def test_processes_without_a_common_disk_make_one_model(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """The second process has another folder of that name, with a run of somebody else's."""
    together, one, two = (tmp_path / name for name in ("together", "one", "two"))
    for folder in (together, one, two / "run" / "checkpoints" / "step-99999999"):
        folder.mkdir(parents=True)
    (two / "run" / "recipe.yaml").write_text("train: {epochs: 1000}")
    (two / "run" / "checkpoints" / "best.safetensors").write_bytes(b"of another model")
    stale = content(two)
    start = partial(Forked, *TRAIN, RELATIVE, environment=environment)
    code, output = start(folders=(together, together)).wait()
    assert code == 0, output
    assert "not on a disk" not in output

    apart: Any = partial(start, folders=(one, two))
    kill_at(apart(), lambda: bool(RunFolder(one / "run").steps()))
    code, output = apart("--resume").wait()
    assert code == 0, output
    assert "run is not on a disk of processes 1" in output
    assert "continuing" in output
    before, after = weights(together / "run"), weights(one / "run")
    assert all(before[key].equal(after[key]) for key in before | after)
    assert content(two) == stale
    records = (read_records(folder / "run") for folder in (together, one))
    for whole, continued in zip(*records, strict=True):
        assert whole["key"] == continued["key"]
        assert whole["outcomes"] == continued["outcomes"]
