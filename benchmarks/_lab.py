"""Runs that faults.py does something to, and the same run that was left alone."""

import itertools
import multiprocessing
import os
import random
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "training")]
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])

multiprocessing.set_forkserver_preload(
    ["robust_accel.training.run", "matplotlib.pyplot", "sklearn.datasets", "plotly.graph_objects"]
)

from launching import CPU, FSDP2, ZERO2, Forked, counts, weights  # noqa: E402

from robust_accel.evaluation.ledger import read_records  # noqa: E402
from robust_accel.run_folder import RunFolder  # noqa: E402

RUN = shlex.split("""
    train quickstart communication.name=qsgd communication.bits=8 data.train_size=320
    data.validation_size=64 train.batch_size=32 train.epochs=2 train.checkpoint_every=3
    train.log_every=1 train.validate_every=1 train.select=best train.validation_steps=2
    train.ema_decay=0.9 train.timeout=2m attack.num_steps=2 attack.step_size=0.1
    evaluate.autoattack=null evaluate.images=80 evaluate.batch_size=20 evaluate.pgd.num_steps=3
""")
ENGINES: dict[str, tuple[int, dict[str, str]]] = {
    "one process": (1, {}),
    "DDP": (2, CPU),
    **{
        f"ZeRO {stage}": (2, ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)})
        for stage in range(3)
    },
    "FSDP2": (2, FSDP2 | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "PreActBlock"}),
}


@dataclass
class Row:
    """A line of the table."""

    fault: str
    times: int = 0
    lost: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    about: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        took = sorted(self.seconds)
        cells = f"{statistics.median(took):.1f} ({took[-1]:.1f})" if took else ""
        about = ", ".join(f"{number} {what}" for what, number in self.about.most_common())
        lost = f"{len(self.lost)}" + (f": {'; '.join(self.lost)}" if self.lost else "")
        return f"| {self.fault} | {self.times} | {lost} | {cells} | {about} |"


class Lab:
    """Runs of one kind, and what they should end as.

    Args:
        root: Of all their folders.
        engine: A key of `ENGINES`.
    """

    def __init__(self, root: Path, engine: str, draws: random.Random) -> None:
        self.root, self.engine, self.draws = root / engine.replace(" ", "-"), engine, draws
        self.numbers = itertools.count()
        began = time.monotonic()
        self.whole = self.folder()
        code, output = self.start(self.whole).wait()
        assert code == 0, output
        self.seconds = time.monotonic() - began

    def folder(self) -> RunFolder:
        """One for a new run."""
        return RunFolder(self.root / f"run{next(self.numbers)}")

    def start(self, folder: RunFolder, *more: str) -> Forked:
        number, environment = ENGINES[self.engine]
        command = (*RUN, f"output={folder.path}", *more)
        return Forked(*command, num_processes=number, environment=environment)

    def resumed(self, folder: RunFolder, row: Row, *more: str) -> None:
        """Go on to the end, and note what was lost."""
        process, new = self.start(folder, "--resume", *more), self.progress(folder, row)
        while process.running() and not new():
            time.sleep(0.02)
        new(ended=True)
        code, output = process.wait()
        fault = f"code {code}: {output.strip().splitlines()[-1:]}" if code else self.loss(folder)
        if fault:
            row.lost.append(fault)

    def progress(self, folder: RunFolder, row: Row) -> Callable[..., bool]:
        """A function that notes how long it takes until something is done that was not before."""
        began, before = time.monotonic(), _done(folder)

        def new(ended: bool = False) -> bool:
            if before is not None and (ended or _done(folder) != before):
                row.seconds.append(time.monotonic() - began)
                return True
            return False

        return new

    def loss(self, folder: RunFolder) -> str:
        """In what a run differs from the one that was left alone; nothing if in nothing."""
        expected, found = weights(self.whole.path), weights(folder.path)
        if not all(expected[key].equal(found[key]) for key in expected | found):
            return "other weights"
        if counts(folder) != counts(self.whole):
            return "other metrics"
        verdicts = [[r["outcomes"] for r in read_records(f.path)] for f in (folder, self.whole)]
        if _without_seconds(verdicts[0]) != _without_seconds(verdicts[1]):
            return "other verdicts"
        left = [str(p) for p in folder.path.rglob("*incomplete*")] + [
            str(p) for p in folder.path.rglob("replaced-*")
        ]
        return f"left behind: {left}" if left else ""


def _done(folder: RunFolder) -> tuple[str, ...] | None:
    return (*(path.name for path in folder.steps()), str(folder.report.exists()))


def _without_seconds(verdicts: list[dict]) -> list[dict]:
    return [{k: v for k, v in outcome.items() if "second" not in k} for outcome in verdicts]


def until(condition: Callable[[], object], process: Forked, limit: float = 60) -> bool:
    """Wait until something is so; false if the process ends before."""
    deadline = time.monotonic() + limit
    while process.running() and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.0005)
    return False


def alive_after(
    seconds: float, process: Forked, meanwhile: Callable[[], object] = lambda: None
) -> bool:
    """Wait so long; false if the process ends before."""
    moment = time.monotonic() + seconds
    return until(lambda: (meanwhile(), time.monotonic() > moment)[1], process)


def newly(folder: RunFolder, pattern: str) -> Callable[[], bool]:
    """A function that tells whether there are files that were not there now."""

    def now() -> set[Path]:
        try:
            return set(folder.path.glob(pattern))
        except FileNotFoundError:  # a folder was removed while it was looked into
            return set()

    old = now()
    return lambda: bool(now() - old)
