"""Runs what a study lacks: processes of this package's own commands, some at a time."""

import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from robust_accel.exit_codes import INTERRUPTED, NOT_FINITE, STOPPED
from robust_accel.files import append_line, read_lines
from robust_accel.studies.after import RUN, left_behind
from robust_accel.studies.plan import Chosen, Plan
from robust_accel.studies.trial import Command, Trial
from robust_accel.training.stopping import OVERSEER, process_mark

logger = logging.getLogger(__name__)

CHANGED = "its recipe or launcher has changed since the last table"
"""What is said of a training that is another than it was."""
UNFINISHED = "unfinished"
"""What has become of a command that was stopped, and has kept what it did."""
Line = dict[str, Any]
_PAUSE = 0.2
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW  # through no link to another file


class Done:
    """What is done of which training, kept in ``done.jsonl`` beside the runs.

    Args:
        root: The folder of all runs.
        earlier: Finished trainings of the study's earlier tables, lines by name.
    """

    def __init__(self, root: Path, earlier: Mapping[str, Line] = MappingProxyType({})) -> None:
        self._file, self.earlier = root / "done.jsonl", earlier
        self._lines: dict[tuple[str, str], Line] = {}
        self._before: dict[str, float] = {}  # digest -> seconds of what was gone on from
        self._checked: set[Path] = set()
        for line in read_lines(self._file) if self._file.exists() else []:
            self._keep(line)

    def _keep(self, line: Line) -> None:
        digest, command = str(line.get("digest")), str(line.get("command"))
        if line.get("outcome") == UNFINISHED:
            self._before[digest] = self._before.get(digest, 0.0) + float(line.get("seconds", 0))
            return
        if command == "train":  # anew: what was done of an earlier one is gone
            self._lines = {key: old for key, old in self._lines.items() if key[0] != digest}
        self._lines[digest, command] = line

    def left(self, trial: Trial) -> list[Command]:
        """Commands that a training lacks, in their order; none after one that cannot be done.

        Raises:
            RecipeError: What is there was trained with other defaults.
        """
        if self.failed(trial):
            return []
        if not (trial.folder / "report.json").exists():
            return [command for command in trial.commands if command[0] != "evaluate"]
        if trial.folder not in self._checked:
            trial.check()
            self._checked.add(trial.folder)
        done = self._lines
        return [c for c in trial.commands if (trial.digest, _text(c)) not in done]

    def failed(self, trial: Trial) -> bool:
        """Whether its training met numbers that are not finite: it would again."""
        line = self._lines.get((trial.digest, "train"))
        return line is not None and line.get("outcome") == "not finite"

    def stale(self, trials: Iterable[Trial]) -> list[Trial]:
        """Trainings that an earlier table had by other settings, and that are not done by these."""
        return [
            trial
            for trial in trials
            if self.earlier.get(trial.name, {}).get("digest") not in (None, trial.digest)
            and ("train",) in self.left(trial)
        ]

    def add(self, trial: Trial, command: Command, outcome: str, seconds: float) -> None:
        commands = [command]
        if command == ("train",) and outcome != UNFINISHED:  # measures as well
            commands.append(trial.commands[1])
        for one in commands:
            line = {
                "digest": trial.digest,
                "command": _text(one),
                "outcome": outcome,
                "seconds": round(seconds, 1),
                "name": trial.name,
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            }
            append_line(self._file, line)
            self._keep(line)
            seconds = 0.0

    def seconds(self, trials: Iterable[Trial]) -> dict[str, float]:
        """What trainings took that are done, by digest, with all that they were gone on from."""
        wanted = {trial.digest for trial in trials}
        found = {digest: self._before[digest] for digest in wanted & self._before.keys()}
        for (digest, _), line in self._lines.items():
            if digest in wanted:
                found[str(digest)] = found.get(str(digest), 0.0) + float(line.get("seconds", 0))
        return found


def _text(command: Command) -> str:
    return shlex.join(command)


@dataclass
class _Job:
    trial: Trial
    command: Command
    process: subprocess.Popen[bytes]
    log: Path
    said: int  # bytes of the log that earlier ones have written
    devices: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)


class Runner:
    """Runs commands until nothing is left.

    Args:
        jobs: How many at a time, spread over the GPUs that are visible.
        launcher: What starts a training instead of ``python -m robust_accel``, with ``{processes}``
            where their number belongs: a cluster's ``accelerate launch ...``.
    """

    def __init__(
        self,
        plan: Plan,
        done: Done,
        *,
        jobs: int,
        launcher: str | None,
    ) -> None:
        self.plan, self.done, self.jobs, self.launcher = plan, done, jobs, launcher
        self.broken: dict[Path, str] = {}  # folder -> where its log is
        self._running: list[_Job] = []
        self._told: set[str] = set()  # names of those that are trained anew

    def run(self, chosen: Chosen) -> None:
        """Do what is missing.

        Raises:
            Stopped: By a signal, after the trainings have kept what they have done.
        """
        try:
            waiting = self._waiting(chosen)
            while waiting or self._running:
                while waiting and len(self._running) < self.jobs:
                    self._start(*waiting.pop(0))
                time.sleep(_PAUSE)
                ended = [job for job in self._running if job.process.poll() is not None]
                for job in ended:
                    self._running.remove(job)
                    self._ended(job, chosen)
                if ended:
                    waiting = self._waiting(chosen)
        except BaseException as error:  # what runs keeps what it has done
            self._end(getattr(error, "request", signal.SIGTERM))
            raise

    def _waiting(self, chosen: Chosen) -> list[tuple[Trial, Command]]:
        """What can be started now."""
        busy = {job.trial.folder for job in self._running}
        trials = self.plan.known(chosen)
        for name in [trial.name for trial in self.done.stale(trials)]:
            if name not in self._told:
                logger.warning(f"{name}: {CHANGED}: it is trained anew")
                self._told.add(name)
        left = {trial: self.done.left(trial) for trial in trials}
        unfinished = {trial.folder for trial in trials if left[trial]}
        lost = {trial.folder for trial in trials if self.done.failed(trial)}
        found = []
        for trial in trials:
            is_free = trial.folder not in busy and trial.folder not in self.broken
            if left[trial] and is_free and not unfinished.intersection(trial.needs):
                if any(need in self.broken or need in lost for need in trial.needs):
                    continue
                found.append((trial, left[trial][0]))
                busy.add(trial.folder)  # others of this training take their turn
        return found

    def _start(self, trial: Trial, command: Command) -> None:
        trial.folder.parent.mkdir(parents=True, exist_ok=True)
        log = trial.folder.with_name(f"{trial.folder.name}.log")
        threads = max(1, (os.cpu_count() or 1) // (self.jobs * trial.processes))
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        environment[OVERSEER] = process_mark(os.getpid())
        if trial.processes > 1 and not torch.cuda.is_available():
            environment["ACCELERATE_USE_CPU"] = "true"
        devices = self._devices(trial)
        if devices:
            environment[_VISIBLE] = ",".join(devices)
        rest = left_behind(trial, command)
        if rest is not None:  # of one that ended before it was written down
            rest.unlink(missing_ok=True)
        with os.fdopen(os.open(log, _APPEND, 0o666), "ab") as file:
            said = file.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                [*self._launch(trial), *self._words(trial, command)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # Ctrl-C comes to this process, which passes it on once
            )
        self._running.append(_Job(trial, command, process, log, said, devices))

    def _devices(self, trial: Trial) -> list[str]:
        """The GPUs that fewest trainings use, one a process; none where there is no choice."""
        if self.jobs == 1 or self.launcher is not None:
            return []
        named = os.environ.get(_VISIBLE, "").split(",")
        devices = [*map(str, range(torch.cuda.device_count()))] if named == [""] else named
        used = [device for job in self._running for device in job.devices]
        return sorted(devices, key=used.count)[: trial.processes] if len(devices) > 1 else []

    def _launch(self, trial: Trial) -> list[str]:
        if self.launcher is not None:
            words = shlex.split(self.launcher.replace("{processes}", str(trial.processes)))
            return [*words, "-m", "robust_accel"]
        python = [sys.executable, "-m"]
        if trial.processes > 1:
            flags = ["--multi_gpu", "--num_processes", str(trial.processes)]
            flags += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            flags += ["--main_process_port", str(_free_port()), "-m"]
            python = [*python, "accelerate.commands.launch", *flags]
        return [*python, "robust_accel"]

    def _words(self, trial: Trial, command: Command) -> list[str]:
        name, *words = trial.arguments(command)
        if name == "train":
            recipe = trial.folder.with_name(f"{trial.folder.name}.yaml")
            trial.recipe.save(recipe)
            return ["train", str(recipe), f"output={trial.folder}", "--resume"]
        words = [word.replace(RUN, str(trial.folder)) for word in words]
        return [name, str(trial.folder), *words]

    def _ended(self, job: _Job, chosen: Chosen) -> None:
        code, seconds = job.process.returncode, time.monotonic() - job.began
        name = f"{job.trial.name}: {job.command[0]}"
        if code == 0:
            self.done.add(job.trial, job.command, "done", seconds)
        elif code == NOT_FINITE and job.command[0] == "train" and _was_not_finite(job):
            self.done.add(job.trial, job.command, "not finite", seconds)
        else:
            why = f"failed with exit code {code}"
            if code in (STOPPED, INTERRUPTED):
                why = "was stopped; the same command goes on"
                self.done.add(job.trial, job.command, UNFINISHED, seconds)
            self.broken[job.trial.folder] = f"{name} {why}, see {job.log}"
        ended = "done" if code == 0 else "met numbers that are not finite"
        how = self.broken.get(job.trial.folder, f"{name} {ended}")
        logger.info(f"{how}, {_span(seconds)}; {self._outlook(chosen)}")

    def _outlook(self, chosen: Chosen) -> str:
        """How many trainings are done, and the time that is left, by what those took."""
        trials = self.plan.known(chosen)
        took = self.done.seconds(trials)
        whole = [t for t in trials if t.digest in took and not self.done.left(t)]
        left = self.plan.number - len(whole)
        if not whole or not left:
            return f"{len(whole)} of {self.plan.number} done"
        rate = sum(took[t.digest] for t in whole) / sum(t.passes for t in whole)
        expected = rate * max(0.0, self.plan.passes - sum(t.passes for t in whole))
        return f"{len(whole)} of {self.plan.number} done, about {_span(expected / self.jobs)} left"

    def _end(self, number: int) -> None:
        for job in self._running:
            job.process.send_signal(number)
        for job in self._running:
            code, seconds = job.process.wait(), time.monotonic() - job.began
            self.done.add(job.trial, job.command, UNFINISHED if code else "done", seconds)


def _was_not_finite(job: _Job) -> bool:
    """Whether the command has said so itself."""
    with job.log.open("rb") as file:
        file.seek(job.said)
        said = file.read().decode(errors="replace")
    return any(line.startswith("robust-accel: ") and "finite" in line for line in said.splitlines())


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
