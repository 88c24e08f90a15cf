"""What the launcher asks for, and training refuses."""

from pathlib import Path

import pytest
import torch
from launching import Forked


@pytest.mark.skipif(torch.cuda.is_available(), reason="they join there")
def test_processes_that_are_not_joined_are_not_as_many_runs(tmp_path: Path) -> None:
    code, output = Forked(
        "train", "quickstart", f"output={tmp_path / 'run'}", environment={}
    ).wait()
    assert code != 0
    assert "has started 2 processes, and Accelerate joins 1: without GPUs" in output
    assert not (tmp_path / "run").exists()
