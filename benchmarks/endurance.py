"""Does a long run grow? Memory, threads and descriptors of two processes over 5,000 steps.

With quantised gradients, checkpoints, validation and evaluation, by the launcher. A line a tenth of
the run: the processes' largest of each; the last lines should be as the third.

    .venv/bin/python benchmarks/endurance.py [--steps 5000]
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from robust_accel.files import read_lines

RUN = shlex.split("""
    train quickstart communication.name=qsgd communication.bits=8 train.batch_size=64
    data.validation_size=137 train.log_every=10 train.checkpoint_every=50 train.validation_steps=2
    train.select=best attack.num_steps=1 attack.step_size=0.2 evaluate.autoattack=quick
    evaluate.autoattack_images=40 evaluate.pgd.num_steps=5
""")
STEPS_PER_EPOCH = (1437 - 137) // 64


def measure(ranks: list[psutil.Process]) -> dict[str, float]:
    """MiB, threads and descriptors, the largest of all processes; children of theirs count, too."""
    found = []
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            found.append((rank.memory_info().rss / 2**20, rank.num_threads(), rank.num_fds()))
    names = ("memory (MiB)", "threads", "descriptors")
    return dict(zip(names, map(max, zip(*found, strict=True)), strict=True)) if found else {}


def step_of(metrics: Path) -> int:
    return max((line["step"] for line in read_lines(metrics)), default=0) if metrics.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5000)
    steps = parser.parse_args().steps
    epochs = -(-steps // STEPS_PER_EPOCH)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        launcher += ["--num_processes", "2", "-m", "robust_accel"]
        settings = [f"output={folder}", f"train.epochs={epochs}", f"train.max_steps={steps}"]
        with (Path(root) / "log").open("w") as log:
            process = subprocess.Popen(
                [*launcher, *RUN, *settings],
                env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )
        print(
            "| step | memory (MiB) | threads | descriptors | run folder (MiB) |\n"
            + "|---" * 5
            + "|"
        )
        tenth = 0
        while process.poll() is None:
            time.sleep(1)
            step = step_of(folder / "metrics.jsonl")
            if 10 * step // steps > tenth:
                tenth = 10 * step // steps
                ranks = psutil.Process(process.pid).children()
                kept = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20
                cells = [f"{value:.0f}" for value in measure(ranks).values()]
                print(f"| {step} | {' | '.join(cells)} | {kept:.1f} |", flush=True)
        print((Path(root) / "log").read_text()[-700:])
        sys.exit(process.returncode)


if __name__ == "__main__":
    main()
