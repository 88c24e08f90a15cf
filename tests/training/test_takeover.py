"""The first process has no run on its disk, but another has: as where a machine was replaced."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from launching import SMALL, Forked, counts, kill_at, weights

from robust_accel.run_folder import RunFolder

pytestmark = pytest.mark.launch

TRAIN = [setting for setting in SMALL if not setting.startswith("communication.")]
start = partial(
    Forked, "train", "quickstart", *TRAIN, "output=run", "evaluate.pgd=null", "evaluate.images=20"
)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` has the finished run, `cut` one that was killed, `old` an earlier state of it."""
    root = tmp_path_factory.mktemp("disks")
    for name in ("whole", "cut", "none"):
        (root / name).mkdir()
    code, output = start(folders=(root / "whole", root / "whole")).wait()
    assert code == 0, output
    folder = RunFolder(root / "cut" / "run")
    kill_at(start(folders=(root / "cut", root / "none")), lambda: len(folder.steps()) == 2)
    shutil.copytree(root / "cut", root / "old")
    shutil.rmtree(RunFolder(root / "old" / "run").steps()[-1])
    return root


def newest(disk: Path) -> int:
    return int(RunFolder(disk / "run").steps()[-1].name.removeprefix("step-"))


def test_a_run_is_taken_over_and_ends_as_if_nothing_had_been(disks: Path, tmp_path: Path) -> None:
    code, output = start("--resume", folders=(tmp_path, disks / "old")).wait()
    assert code == 0, output
    step = newest(disks / "old")
    assert f"run is taken over at step {step} from the disk of process 1" in output
    assert f"continuing run at step {step}" in output
    before, after = weights(disks / "whole" / "run"), weights(tmp_path / "run")
    assert all(before[key].equal(after[key]) for key in before | after)
    assert counts(RunFolder(tmp_path / "run")) == counts(RunFolder(disks / "whole" / "run"))
    assert not list(tmp_path.rglob("*incomplete*"))


@pytest.mark.long
def test_of_several_it_is_the_one_that_has_been_furthest(disks: Path, tmp_path: Path) -> None:
    """Of whole checkpoints: what a killed process had begun is none."""
    shutil.copytree(disks / "cut", tmp_path / "broken")
    for path in RunFolder(tmp_path / "broken" / "run").steps():
        (path / "model.safetensors").unlink()
    (tmp_path / "new" / "run" / ".incomplete-run" / "model").mkdir(parents=True)
    places = [tmp_path / "new", disks / "old", disks / "cut", tmp_path / "broken"]
    process = start("--resume", folders=places, num_processes=4)
    code, output = process.wait()
    assert code == 0, output
    assert newest(disks / "cut") > newest(disks / "old")
    assert f"taken over at step {newest(disks / 'cut')} from the disk of process 2" in output
    assert "what process 3 has on its disk is not gone on with: output: run has no" in output


def test_what_was_started_otherwise_is_not_taken(disks: Path, tmp_path: Path) -> None:
    process = start("--resume", "train.max_steps=1", folders=(tmp_path, disks / "cut"))
    code, output = process.wait()
    assert code == 0, output
    assert "what process 1 has on its disk is not gone on with: output: run was started" in output
    assert "taken over" not in output and "continuing" not in output
