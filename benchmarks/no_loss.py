"""Does quantising gradients cost accuracy? Paired seeds on CIFAR-10, two real processes.

Each run is `accelerate launch ... train cifar10/cpu`, shortened, with one protocol and one seed.
Within a seed everything but the protocol is equal: first weights, order of the images, noise of the
attack. What is reported is the difference to fp32 within a seed, averaged over the seeds, with its
95% t-interval. Finished runs are kept: the same command again makes only what is missing.

python benchmarks/no_loss.py
python benchmarks/no_loss.py --table
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from _seeds import MEASURES, accuracy_table, markdown, row_of

ROOT = Path(__file__).resolve().parent.parent
WHOLE_VECTOR = "whole"  # block_size of the paper's form: null is one norm a tensor
BASELINE = "fp32"
PROTOCOLS: dict[str, tuple[str, ...]] = {
    BASELINE: ("name=allreduce",),
    "8bit-1sided": ("name=qsgd", "bits=8", "sides=1"),
    "8bit-2sided": ("name=qsgd", "bits=8", "sides=2"),
    "4bit-2sided": ("name=qsgd", "bits=4", "sides=2"),
    # the paper's (A5): the L2 norm of the vector, 2^bits levels
    "8bit-2sided-l2": (
        "name=qsgd", "bits=8", "sides=2", "norm=l2", f"block_size={WHOLE_VECTOR}",
    ),
}  # fmt: skip


def run_folder(args: argparse.Namespace, protocol: str, seed: int) -> Path:
    """One folder a run; the settings that change its meaning are in the path."""
    schedule = f"{args.train_size}x{args.epochs}"
    name = protocol + (f"-{WHOLE_VECTOR}" if protocol.endswith("l2") else "")
    return args.output / schedule / name / f"seed{seed}"


def read_report(folder: Path) -> dict[str, Any] | None:
    """A finished run's report; None where the run is missing or was interrupted."""
    path = folder / "report.json"
    if not path.exists():
        return None
    report = json.loads(path.read_text())
    if any(row_of(report, attack) is None for attack in MEASURES.values()):
        return None
    if report["num_processes"] != 2:
        raise ValueError(f"{path}: not two processes")
    return report


def train(args: argparse.Namespace, protocol: str, seed: int) -> bool:
    """Train and evaluate one run by the launcher, and say whether its report is there."""
    folder = run_folder(args, protocol, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    communication = [f"communication.{setting}" for setting in PROTOCOLS[protocol]]
    if protocol != BASELINE:
        communication.append(f"communication.seed={seed}")  # other rounding with each seed
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
        "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", str(free_port()),
        "-m", "robust_accel", "train", "cifar10/cpu", "--resume", "--quiet", f"output={folder}",
        f"data.path={args.data}", f"data.train_size={args.train_size}", "data.validation_size=0",
        f"train.epochs={args.epochs}", f"train.seed={seed}", "train.select=last",
        f"evaluate.images={args.images}", "evaluate.autoattack=null", "evaluate.pgd.num_steps=20",
        *communication,
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            process.wait()
        finally:  # the launcher must outlive an interruption to end its own two processes
            process.terminate()
            process.wait()
    return read_report(folder) is not None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_all(args: argparse.Namespace) -> Iterator[Path]:
    """Make what is missing, seed by seed so that pairs complete early; yields the failed runs."""
    for seed in args.seeds:
        for protocol in args.protocols:
            folder = run_folder(args, protocol, seed)
            if read_report(folder) is not None:
                continue
            print(f"{protocol}, seed {seed} ...", flush=True)
            if not train(args, protocol, seed):
                print(f"  failed: see {folder.with_suffix('.log')}", flush=True)
                yield folder


def table(args: argparse.Namespace) -> str:
    """Markdown: mean accuracies, paired differences to fp32, and bytes per step."""
    reports = {
        name: {s: report for s in args.seeds if (report := read_report(run_folder(args, name, s)))}
        for name in args.protocols
    }
    rows = accuracy_table(reports, BASELINE)
    rows[0] += ["bytes/step", "share"]
    full = _bytes(reports.get(BASELINE, {}))
    for row in rows[1:]:
        sent = _bytes(reports[row[0]])
        row += [f"{sent:,.0f}", f"1/{full / sent:.2f}" if full else ""]
    return markdown(rows)


def _bytes(runs: dict[int, Any]) -> float:
    """Sent by a process in a step, averaged over the seeds."""
    return fmean(run["bytes_sent_per_step"] for run in runs.values()) if runs else 0.0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    data = Path(os.environ.get("ROBUST_ACCEL_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train-size", type=int, default=5000, help="training images")
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--data", type=Path, default=data / "cifar10", help="CIFAR-10's folder")
    parser.add_argument("--output", type=Path, default=Path("runs/no_loss"))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    return parser.parse_args(arguments)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args = parse()
    failed = [] if args.table else list(train_all(args))
    print(table(args))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
