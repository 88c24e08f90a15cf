"""What the launcher asks for, and training refuses."""

from pathlib import Path

import pytest

from robust_accel.__main__ import main


def test_fsdp_is_refused_and_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # as recipes/accelerate/fsdp2.yaml sets it; Accelerate would train by DDP on CPUs
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", "quickstart", f"output={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err.strip()
    assert "distributed_type: FSDP is not possible with train: use DDP or DeepSpeed" in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()
