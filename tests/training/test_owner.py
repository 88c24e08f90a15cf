"""A run folder has one owner: one run at a time, and one process that decides for all."""

import hashlib
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from launching import CPU, SMALL, ZERO2, Forked, counts, kill_at, weights
from safetensors.torch import load_file, save_file

from robust_accel.evaluation.ledger import read_records
from robust_accel.files import read_lines
from robust_accel.locks import OWNER, locked
from robust_accel.run_folder import RunFolder

pytestmark = pytest.mark.launch

TINY = tuple(setting for setting in SMALL if not setting.startswith("communication."))
TINY += ("train.epochs=1", "train.max_steps=4", "evaluate.pgd=null", "evaluate.images=20")
TINY += ("evaluate.train_images=null",)
TRAIN = ("train", "quickstart", *SMALL, "train.validate_every=1")
TRAIN += ("train.select=best",)
RELATIVE = "output=run"


DIVERGING = """
import os, sys
from robust_accel.__main__ import main
from robust_accel.training import run

fit = run._Run.fit

def diverging(self):
    fit(self)
    if os.environ["RANK"] == "1":
        next(self.classifier.parameters()).data.view(-1)[0] += 1e-6

run._Run.fit = diverging
sys.exit(main(sys.argv[1:]))
"""


def units(folder: Path) -> set[str]:
    """Work of measurements that the folder knows."""
    paths = (folder / "measurements").glob("process-*.jsonl")
    return {line["key"] for path in paths for line in read_lines(path)}


def content(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != OWNER)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_of_runs_that_start_at_once_one_wins(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    arguments = ("train", "quickstart", *TINY, f"output={folder.path}")
    both = [Forked(*arguments, num_processes=1, environment={}) for _ in range(3)]
    ends = [process.wait() for process in both]
    assert sorted(code for code, _ in ends) == [0, 2, 2], ends
    for code, output in ends:
        refused = "is in use by process " in output or "already holds a run" in output
        assert refused == (code == 2), output
    steps = [line["step"] for line in folder.read_metrics() if "loss" in line]
    assert steps == [4]
    assert len(read_records(folder.path)) == 1
    assert not (folder.path / OWNER).exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    code, output = Forked("train", "quickstart", *TINY, f"output={folder}").wait()
    assert code == 0, output
    return folder


def test_no_command_writes_into_a_folder_in_use(small: Path) -> None:
    folder = small
    before = content(folder)
    with locked(folder):
        for command in (
            ("train", "quickstart", *TINY, f"output={folder}", "--resume"),
            ("evaluate", folder, "evaluate.images=10"),
            (
                "certify",
                folder,
                "certify.images=1",
                "certify.sigma=0.1",
                "certify.n0=5",
                "certify.n=10",
            ),
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
    kill_at(apart(), lambda: len(RunFolder(one / "run").steps()) >= 2)
    newest = RunFolder(one / "run").steps()[-1]
    (newest / "random_states_1.pkl").unlink()  # the other process's, which it has never seen
    code, output = apart("--resume").wait()
    assert code == 0, output
    assert "run is not on a disk of processes 1" in output
    assert f"{newest.name}: random_states_1.pkl is missing: it is not used" in output
    assert "continuing" in output
    before, after = weights(together / "run"), weights(one / "run")
    assert all(before[key].equal(after[key]) for key in before | after)
    assert counts(RunFolder(one / "run")) == counts(RunFolder(together / "run"))
    assert units(one / "run") == units(together / "run")
    assert content(two) == stale
    records = (read_records(folder / "run") for folder in (together, one))
    for whole, continued in zip(*records, strict=True):
        assert whole["key"] == continued["key"]
        assert whole["outcomes"] == continued["outcomes"]


def test_weights_that_differ_between_processes_are_an_error(tmp_path: Path) -> None:
    script = tmp_path / "diverging.py"
    script.write_text(DIVERGING)
    folder = RunFolder(tmp_path / "run")
    process = Forked("train", "quickstart", *TINY, f"output={folder.path}", script=script)
    _, output = process.wait()
    assert [p.exitcode for p in process.processes] == [2, 2], output
    assert output.count("processes 1 hold other weights than process 0") == 1
    assert "Traceback" not in output
    assert not folder.model.exists()
    assert read_records(folder.path) == []


def test_models_that_differ_between_processes_are_not_measured(small: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        shutil.copytree(small, folder / "run")
    path = two / "run" / "model" / "model.safetensors"
    state = load_file(path)
    next(tensor for tensor in state.values() if tensor.ndim > 1)[0] += 1e-3
    save_file(state, path, {"format": "pt"})
    process = Forked("evaluate", "run", "evaluate.images=10", folders=(one, two))
    _, output = process.wait()
    assert [p.exitcode for p in process.processes] == [2, 2], output
    assert output.count("the processes hold different models") == 1
    assert len(read_records(one / "run")) == len(read_records(small))
