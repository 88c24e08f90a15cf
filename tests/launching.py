"""Two real processes under the real launcher, for the tests that need them."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from safetensors.torch import load_file

from robust_accel.run_folder import RunFolder

DDP = ("--multi_gpu", "--num_processes", "2")
SMALL = (
    "communication.name=qsgd",
    "communication.bits=8",
    "train.epochs=2",
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


PACKAGE = ("-m", "robust_accel")


def start(
    *arguments: object, flags: tuple[str, ...] = DDP, what: Sequence[str] = PACKAGE
) -> subprocess.Popen[str]:
    port = str(20000 + os.getpid() % 20000)
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    cpu = {"ACCELERATE_USE_CPU": "true"} if flags == DDP else {}  # the variable disables DeepSpeed
    return subprocess.Popen(
        [*command, "--main_process_port", port, *what, *map(str, arguments)],
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


def launch(
    *arguments: object, flags: tuple[str, ...] = DDP, what: Sequence[str] = PACKAGE
) -> tuple[int, str]:
    """Two processes of the command, or of `what` instead: their status and all they say."""
    process = start(*arguments, flags=flags, what=what)
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, output


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


def quickstart_run(folder: Path) -> Path:
    """A small run by two processes, with quantised gradients."""
    code, output = launch("train", "quickstart", *SMALL, f"output={folder}")
    assert code == 0, output
    return folder


def weights(folder: Path) -> dict:
    return load_file(folder / "model" / "model.safetensors")
