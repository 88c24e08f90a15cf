"""Two real processes: under the real launcher, or forked from one that has imported everything."""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pictures  # noqa: F401  # none in forked processes
import psutil
import pytest
from safetensors.torch import load_file

from robust_accel.__main__ import main
from robust_accel.run_folder import RunFolder

DDP = ("--multi_gpu", "--num_processes", "2")
SMALL = (
    "communication.name=qsgd",
    "communication.bits=8",
    "communication.compile=false",  # the same bytes; compiling takes longer than such a run
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
# What the launcher sets by --multi_gpu on CPUs, and by recipes/accelerate/zero2.yaml.
CPU = {"ACCELERATE_USE_CPU": "true"}
ZERO2 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
# by recipes/accelerate/fsdp2.yaml
LAUNCHER_OF_FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
    "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
FSDP2 = CPU | LAUNCHER_OF_FSDP2
LIMIT_S = 240


class Processes(Protocol):
    def running(self) -> bool: ...
    def kill(self) -> None: ...
    def wait(self) -> tuple[int, str]:
        """Their status and all they say."""


class Launched:
    """Two processes of the command by `accelerate launch`."""

    def __init__(
        self, *arguments: object, flags: tuple[str, ...] = DDP, cpu: bool | None = None
    ) -> None:
        command = [sys.executable, "-m", "accelerate.commands.launch", *flags]
        command += ["--main_process_port", port(), "-m", "robust_accel"]
        if cpu is None:
            cpu = flags[: len(DDP)] == DDP  # it disables DeepSpeed
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            env=os.environ | (CPU if cpu else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """The launcher and its workers, which have sessions of their own, without a word."""
        for victim in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            victim.kill()
        self.process.communicate()

    def wait(self) -> tuple[int, str]:
        try:
            output, _ = self.process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, output


class Forked:
    """Two processes of the command, or of a script, forked: most of a launch is imports.

    Args:
        folders: Where each process is at work; where this one is when not given.
    """

    def __init__(
        self,
        *arguments: object,
        environment: Mapping[str, str] = CPU,
        script: Path | None = None,
        num_processes: int = 2,
        folders: Sequence[Path] = (),
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self.log = Path(tempfile.mkstemp(prefix="forked-", suffix=".log")[1])
        settings = dict(environment)
        if num_processes > 1:
            settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
            settings |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
        what = (settings, self.log, script, [*map(str, arguments)])
        self.processes = [
            context.Process(target=_rank, args=(rank, folder, *what))
            for rank, folder in enumerate(folders or [Path.cwd()] * num_processes)
        ]
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        return all(process.exitcode is None for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.log.unlink()

    def send(self, number: int, *ranks: int) -> None:
        """A signal to some ranks, to both if none is named."""
        for rank in ranks or (0, 1):
            os.kill(self.processes[rank].pid, number)

    def wait(self) -> tuple[int, str]:
        deadline = time.monotonic() + LIMIT_S
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        codes = [process.exitcode for process in self.processes]
        output = self.log.read_text()
        self.kill()
        assert None not in codes, f"still running after {LIMIT_S} s: {output}"
        return next(filter(None, codes), 0), output


def _rank(
    rank: int,
    folder: Path,
    settings: dict[str, str],
    log: Path,
    script: Path | None,
    arguments: Sequence[str],
) -> None:
    """What the launcher and its agent do for a process."""
    gc.freeze()  # DeepSpeed looks for garbage at every start: what is imported is none
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    # what a shell starts in the background ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= settings
    if "WORLD_SIZE" in settings:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if script is None:
        sys.exit(main(list(arguments)))
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def port() -> str:
    return str(20000 + os.getpid() % 20000)


def quickstart_run(folder: Path, start: Callable[..., Processes] = Launched) -> Path:
    """A small run by two processes, with quantised gradients."""
    code, output = start("train", "quickstart", *SMALL, f"output={folder}").wait()
    assert code == 0, output
    return folder


def refused(
    capsys: pytest.CaptureFixture[str], folder: Path, *overrides: str, command: str = "train"
) -> str:
    """The line that this process's run is refused by; no folder is made."""
    assert main([command, "quickstart", *overrides, f"output={folder}"]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert not folder.exists()
    return said


def kill_at(process: Processes, is_time: Callable[[], bool]) -> None:
    """Kill processes, without a word, as soon as it is time."""
    deadline = time.monotonic() + 200
    while not is_time() and process.running() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert is_time()


def killed_and_resumed(finished: Path, path: Path, start: Callable[..., Processes]) -> None:
    """The same run, killed once it has a checkpoint, ends with the same weights and counts.

    Args:
        start: Of `train`, with further arguments.
    """
    folder = RunFolder(path)
    kill_at(start(f"output={path}"), lambda: bool(folder.steps()))
    assert not folder.report.exists()
    code, output = start(f"output={path}", "--resume").wait()
    assert code == 0, output
    assert "continuing" in output
    before, after = weights(finished), weights(folder.path)
    assert all(before[key].equal(after[key]) for key in before | after)
    assert counts(folder) == counts(RunFolder(finished))


def counts(folder: RunFolder) -> list[dict]:
    """What a run has written while it trained, but for what the clock says."""
    lines = [*folder.read_metrics(), {"sent": folder.read_report()["bytes_sent_per_step"]}]
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def wait_until(condition: Callable[[], object], process: Processes, seconds: float = 200) -> None:
    """Until something is true, while the processes run."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.running(), process.wait()
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.01)


def weights(folder: Path) -> dict:
    return load_file(folder / "model" / "model.safetensors")
