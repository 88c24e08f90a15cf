"""Room on the disk: asked for before training; when it is used up, nothing is lost."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import fill

from robust_accel.__main__ import main
from robust_accel.exit_codes import UNWRITABLE, USAGE, Unwritable
from robust_accel.run_folder import RunFolder
from robust_accel.training.disk import told_when_full

RUN = (
    "quickstart",
    "data.train_size=128",
    "data.validation_size=0",
    "train.epochs=1",
    "train.batch_size=8",
    "train.checkpoint_every=2",
    "attack.num_steps=1",
    "attack.step_size=0.2",
    "evaluate.autoattack=null",
    "evaluate.pgd=null",
)
CHECKPOINT = 1_000_000  # bytes, about


def train(folder: Path, *more: str) -> int:
    return main(["train", *RUN, f"output={folder}", *more])


def once(condition: Callable[[], object], then: Callable[[], object]) -> threading.Thread:
    """Does something, beside the test, when something is true."""

    def work() -> None:
        while not condition():
            time.sleep(0.001)
        then()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_too_little_room_is_said_before_training(
    disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = disk(CHECKPOINT) / "run"
    assert train(folder) == USAGE
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("robust-accel: output: no room for two checkpoints: a checkpoint takes")
    assert f"are free at {folder.parent}" in said
    assert not folder.exists()


def test_a_disk_that_fills_up_loses_nothing(
    disk: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(disk(8 * CHECKPOINT) / "run")
    filler = folder.path.parent / "filler"
    once(folder.steps, lambda: fill(filler))
    assert train(folder.path) == UNWRITABLE
    error = capsys.readouterr().err
    (said,) = [line for line in error.splitlines() if line.startswith("robust-accel: ")]
    assert "cannot be written: no space left on" in said.lower()
    kept = folder.steps()
    assert f"{kept[-1]} is kept" in said
    assert "Traceback" not in error
    filler.unlink()
    assert train(folder.path, "--resume") == 0
    assert f"at step {int(kept[-1].name.removeprefix('step-'))}\n" in capsys.readouterr().out


def test_a_folder_that_vanishes_ends_the_run_and_is_not_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "run")
    once(folder.steps, lambda: folder.path.rename(tmp_path / "moved"))
    assert train(folder.path) == UNWRITABLE
    assert f"robust-accel: {folder.path} is gone" in capsys.readouterr().err
    assert not folder.checkpoints.exists()


def test_one_that_vanishes_while_it_is_written_is_gone_as_well(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    gone = f"^{re.escape(str(folder.path))} is gone"
    with pytest.raises(Unwritable, match=gone), told_when_full(folder):
        (folder.checkpoints / "step-1").open()
    # what is not the run's is itself
    with pytest.raises(FileNotFoundError, match="elsewhere"), told_when_full(folder):
        (tmp_path / "elsewhere").open()


@pytest.mark.parametrize("case", ["dangling", "below a dangling link", "below a file", "read-only"])
def test_an_output_that_cannot_be_written_is_refused_first(
    disk: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    folder, said = {
        "dangling": (tmp_path / "link", "is a link to "),
        "below a dangling link": (tmp_path / "link" / "run", "is a link to "),
        "below a file": (tmp_path / "file" / "run", "is no folder"),
        "read-only": (tmp_path / "disk" / "run", "cannot be written: Read-only file system"),
    }[case]
    if case == "read-only":
        disk(CHECKPOINT, "ro")
    assert train(folder, "data.path=no/such/data") == USAGE  # before the data are looked at
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("robust-accel: output: ") and said in line
    assert not (tmp_path / "nowhere").exists()


def test_a_path_without_room_for_names_in_it_is_refused_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = "/".join(["y" * 250] * 15)
    assert train(Path(folder), "data.path=no/such/data") == USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("robust-accel: output: 'yyy")
    assert line.endswith("what a run writes into it: 3,764 bytes, allowed are 3,584")
