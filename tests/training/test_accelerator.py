"""Processes that the launcher has started, and training that joins them or is none."""

from pathlib import Path

from launching import SMALL, Forked

from robust_accel.run_folder import RunFolder


def test_processes_that_are_not_joined_are_not_as_many_runs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    small = (*SMALL, "train.max_steps=1", f"output={folder.path}")
    code, output = Forked("train", "quickstart", *small, environment={}).wait()
    if code == 0:  # older versions of Accelerate join them, and so do GPUs
        assert folder.read_report()["num_processes"] == 2
    else:
        assert "has started 2 processes, and Accelerate joins 1: without GPUs" in output
        assert not folder.path.exists()
