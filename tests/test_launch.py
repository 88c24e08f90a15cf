"""Two real processes under the real launcher."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from robust_accel.recipe import RECIPES
from robust_accel.run_folder import RunFolder

pytestmark = pytest.mark.launch

DDP = ("--multi_gpu", "--num_processes", "2")
ZERO = [("--config_file", str(RECIPES / f"accelerate/zero{stage}.yaml")) for stage in (0, 1, 2)]
SMALL = (
    "communication.name=qsgd",
    "communication.bits=8",
    "train.epochs=3",
    "train.validate_every=2",
    "train.checkpoint_every=4",
    "train.log_every=5",
    "attack.num_steps=2",
    "attack.step_size=0.1",
    "data.train_size=784",
    "evaluate.autoattack=null",
    "evaluate.batch_size=100",
    "evaluate.pgd.num_steps=5",
)


def start(*arguments: object, flags: tuple[str, ...] = DDP) -> subprocess.Popen[str]:
    port = str(20000 + os.getpid() % 20000)
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    cpu = {"ACCELERATE_USE_CPU": "true"} if flags == DDP else {}  # the variable disables DeepSpeed
    return subprocess.Popen(
        [*command, "--main_process_port", port, "-m", "robust_accel", *map(str, arguments)],
        env=os.environ | cpu | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """Kill the launcher and its workers, which have sessions of their own, without a word."""
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()
    process.communicate()


def launch(*arguments: object, flags: tuple[str, ...] = DDP) -> tuple[int, str]:
    process = start(*arguments, flags=flags)
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "two"
    code, output = launch("train", "quickstart", *SMALL, f"output={folder}")
    assert code == 0, output
    return folder


def test_two_processes_train_with_equal_parameters_and_count_their_bytes(finished: Path) -> None:
    report = RunFolder(finished).read_report()
    assert report["num_processes"] == 2
    assert report["parameters_equal_on_all_processes"]
    assert report["clean_accuracy"]["n"] == 360
    assert report["clean_accuracy"]["accuracy"] > 0.5
    # 2-sided, 2 workers: 2 (M - 1) / M b d / 8 bytes, scales and small tensors on top
    num_parameters = sum(
        tensor.numel() for key, tensor in weights(finished).items() if "running" not in key
    )
    assert num_parameters < report["bytes_sent_per_step"] < 1.2 * num_parameters
    assert report["comm_seconds_per_epoch"] > 0
    assert report["comm_exposed_seconds_per_epoch"] > 0


@pytest.mark.parametrize("flags", ZERO, ids=["zero0", "zero1", "zero2"])
def test_deepspeed_trains_by_the_same_recipe(
    finished: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    folder = RunFolder(tmp_path / "run")
    code, output = launch("train", "quickstart", *SMALL, f"output={folder.path}", flags=flags)
    assert code == 0, output
    report, by_ddp = folder.read_report(), RunFolder(finished).read_report()
    assert report["num_processes"] == 2
    assert report["parameters_equal_on_all_processes"]
    # the same gradient in other buckets; only their padding differs
    assert report["bytes_sent_per_step"] == pytest.approx(by_ddp["bytes_sent_per_step"], rel=0.02)
    first, expected = folder.read_metrics()[0], RunFolder(finished).read_metrics()[0]
    assert first["loss"] == pytest.approx(expected["loss"], rel=0.02)
    if flags == ZERO[2]:
        killed_and_resumed(folder.path, tmp_path / "killed", flags)


def test_killed_and_resumed_ends_with_the_same_weights(finished: Path, tmp_path: Path) -> None:
    killed_and_resumed(finished, tmp_path / "killed", DDP)


def killed_and_resumed(
    finished: Path, path: Path, flags: tuple[str, ...], settings: Sequence[str] = ()
) -> None:
    folder = RunFolder(path)
    arguments = ("train", "quickstart", *SMALL, *settings, f"output={folder.path}")
    process = start(*arguments, flags=flags)
    deadline = time.monotonic() + 200
    while not folder.steps() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(process)
    assert folder.steps()
    assert not folder.report.exists()
    code, output = launch(*arguments, "--resume", flags=flags)
    assert code == 0, output
    assert "continuing" in output
    before, after = weights(finished), weights(folder.path)
    assert all(before[key].equal(after[key]) for key in before | after)


# All that keeps a state or an order of its own.
REGIMES = {
    "half of each batch pseudo-labelled, TRADES, AWP": (
        "data.train_size=400",
        "data.unlabeled.path={labels}",
        "objective.name=trades",
        "train.awp.gamma=0.01",
        "train.awp.warmup_epochs=1",
        "train.ema_decay=0.9",
    ),
    "fine-tuning layer by layer, online targets on what train_size leaves out": (
        "model.checkpoint={run}",
        "model.new_head=true",
        "optimizer.layer_decay=0.8",
        "data.train_size=400",
        "data.unlabeled.size=500",
        "objective.name=trades",
        "objective.online_targets=true",
        "train.gradient_accumulation=2",
    ),
}


@pytest.fixture(scope="module")
def labels(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of the first run's model for what its training left out, by two processes."""
    path = tmp_path_factory.mktemp("labels") / "pseudo.parquet"
    code, output = launch("pseudo-label", finished, "--out", path)
    assert code == 0, output
    assert "653 images" in output
    return path


@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_resumes_exactly_on_two_processes(
    regime: str, finished: Path, labels: Path, tmp_path: Path
) -> None:
    settings = [s.format(labels=labels, run=finished) for s in REGIMES[regime]]
    whole = tmp_path / "whole"
    code, output = launch("train", "quickstart", *SMALL, *settings, f"output={whole}")
    assert code == 0, output
    report = RunFolder(whole).read_report()
    assert report["parameters_equal_on_all_processes"]
    assert report["bytes_sent_per_step"] > 0
    killed_and_resumed(whole, tmp_path / "killed", DDP, settings)


def test_labels_do_not_depend_on_the_number_of_processes(
    finished: Path, labels: Path, tmp_path: Path
) -> None:
    import datasets

    from robust_accel.pseudo_label import pseudo_label

    pseudo_label(str(finished), tmp_path / "one.parquet")
    one, two = (
        datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path))["train"]
        for path in (tmp_path / "one.parquet", labels)
    )
    for column in ("pseudo_label", "confidence"):
        assert one[column][:] == two[column][:]


def test_evaluation_does_not_depend_on_the_number_of_processes(
    finished: Path, tmp_path: Path
) -> None:
    from robust_accel.evaluate import evaluate_model

    one = evaluate_model(str(finished), [f"output={tmp_path / 'one'}"]).read_report()
    two = RunFolder(finished).read_report()
    for key in ("clean_accuracy", "pgd_accuracy"):
        assert one[key] == two[key]


def test_a_wrong_recipe_stops_before_anything_is_made(tmp_path: Path) -> None:
    code, output = launch(
        "train", "quickstart", "communication.bits=7", "communication.name=qsgd",
        f"output={tmp_path / 'run'}",
    )  # fmt: skip
    assert code != 0
    message = "command line: communication.bits: 7 is not allowed: input should be 16, 8, 4 or 2"
    assert output.count(message) == 1  # once, not once a process
    assert not (tmp_path / "run").exists()


def weights(folder: Path) -> dict:
    return load_file(folder / "model" / "model.safetensors")
