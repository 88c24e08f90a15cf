"""One process meets NaN: both end, or leave out the step, together; DDP and DeepSpeed."""

from pathlib import Path
from typing import Any

import pytest
from launching import CPU, ZERO2, Forked
from training.test_finite import TINY, check_finite

from robust_accel.run_folder import RunFolder

pytestmark = pytest.mark.launch

ENGINES = {"ddp": CPU} | {
    f"zero{stage}": ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)} for stage in range(3)
}
OF_ONE = ("objective.rank=1", "communication={name: qsgd, compile: false}")
OF_ONE += ("train.epochs=2", "evaluate.pgd=null")


def train(folder: Path, engine: str, *settings: str) -> tuple[int, str]:
    command = ("train", "quickstart", *TINY, *OF_ONE, *settings, f"output={folder}")
    return Forked(*command, environment=ENGINES[engine]).wait()


def some_long(*engines: str, default: str) -> list[Any]:
    return [e if e in default else pytest.param(e, marks=pytest.mark.long) for e in engines]


@pytest.mark.parametrize("engine", some_long(*ENGINES, default="ddp"))
def test_one_process_meets_nan_and_both_stop(tmp_path: Path, engine: str) -> None:
    code, output = train(tmp_path, engine, "objective.at=[8]", "objective.where=loss")
    assert code == 1, output
    assert "Traceback" not in output
    folder = RunFolder(tmp_path)
    (last,) = folder.steps()
    (said,) = [line for line in output.splitlines() if "not all numbers are finite" in line]
    assert "the loss since step 8 (process 1 of 2)" in said
    assert f"the last good checkpoint is {last}," in said
    assert last.name == "step-00000006"
    check_finite(tmp_path)


@pytest.mark.long
def test_one_process_is_left_with_nan_by_the_first_step(tmp_path: Path) -> None:
    code, output = train(tmp_path, "ddp", "objective.at=[1]", "objective.where=weight")
    assert code == 1 and "Traceback" not in output, output
    assert "not all numbers are finite" in output
    assert RunFolder(tmp_path).steps() == []


@pytest.mark.parametrize("engine", some_long("ddp", "zero1", "zero2", default=""))
def test_one_process_meets_nan_and_both_skip(tmp_path: Path, engine: str) -> None:
    more = ["train.gradient_accumulation=2", "train.on_nonfinite=skip", "train.ema_decay=0.5"]
    code, output = train(tmp_path, engine, "objective.at=[1,7]", "train.max_steps=6", *more)
    assert code == 0, output
    report = RunFolder(tmp_path).read_report()
    assert (report["skipped_steps"], report["steps"]) == (2, 6)
    check_finite(tmp_path)


def test_half_precision_by_deepspeed_is_in_the_report(tmp_path: Path) -> None:
    code, output = train(tmp_path, "zero2", "train.precision=bf16", "train.max_steps=1")
    assert code == 0, output
    assert RunFolder(tmp_path).read_report()["precision"] == "bf16"


def test_skip_is_refused_where_the_engine_cannot(tmp_path: Path) -> None:
    code, output = train(tmp_path / "run", "zero0", "train.on_nonfinite=skip")
    assert code == 2, output
    assert "train.on_nonfinite: skip is not possible with DeepSpeed's ZeRO 0" in output
    assert not (tmp_path / "run").exists()
