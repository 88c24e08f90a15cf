"""Do unlabelled images, fine-tuning and TRADES do what they promise? CIFAR-10 on two CPU cores.

unlabelled: 4,000 labels alone, or with a teacher's labels on the rest of train, by adversarial
            training or by TRADES. The same number of steps and of labelled images each: the
            unlabelled ones come on top.
online:     TRADES by 4,000 labels alone, or with the rest of train as it is (online targets).
finetune:   half of the classes in 3 epochs: from a network that was trained robustly on the other
            half, from one that was trained normally, and from scratch (Figure 4 of the paper).
trades:     beta 1 and 6.

Every run is one `robust-accel train cifar10/cpu_...`. Differences are within a seed, averaged over
the seeds, with their 95% t-interval. Finished runs are kept: the same command again makes only
what is missing.

python benchmarks/regimes.py unlabelled
python benchmarks/regimes.py finetune --seeds 0 1 2 --table
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from _seeds import accuracy_table, markdown

ROOT = Path(__file__).resolve().parent.parent
STANDARD = ("attack.name=none", "evaluate.eps=8/255")

Settings = dict[str, tuple[str, ...]]
"""Run -> its recipe, then settings, in the order of training; the first of a table is compared."""


def unlabelled(folder: Path) -> Settings:
    labels = f"data.unlabeled.path={folder / 'teacher' / 'pseudo.parquet'}"
    return {
        "labels": ("cpu_labels",),
        "teacher": ("cpu_teacher",),
        "pseudo": ("cpu_pseudo", labels),
        "rst": ("cpu_rst", labels),
    }


def online(folder: Path) -> Settings:
    return {"labels": ("cpu_labels_trades",), "online": ("cpu_online",)}


def finetune(folder: Path) -> Settings:
    return {
        "scratch": ("cpu_scratch",),
        "pretrain": ("cpu_pretrain",),
        "pretrain standard": ("cpu_pretrain", *STANDARD),
        "from robust": ("cpu_finetune", f"model.checkpoint={folder / 'pretrain'}"),
        "from standard": ("cpu_finetune", f"model.checkpoint={folder / 'pretrain standard'}"),
    }


def trades(folder: Path) -> Settings:
    return {f"beta {beta}": ("cpu_trades", f"objective.beta={beta}") for beta in (1, 6)}


STUDIES: dict[str, Callable[[Path], Settings]] = {
    "unlabelled": unlabelled,
    "online": online,
    "finetune": finetune,
    "trades": trades,
}


def seed_folder(args: argparse.Namespace, seed: int) -> Path:
    return args.output / args.study / f"seed{seed}"


def read_report(folder: Path) -> dict[str, Any] | None:
    path = folder / "report.json"
    return json.loads(path.read_text()) if path.exists() else None


def make(args: argparse.Namespace, seed: int) -> list[Path]:
    """Train what one seed lacks; returns the runs that failed."""
    folder = seed_folder(args, seed)
    for name, (recipe, *settings) in STUDIES[args.study](folder).items():
        if args.runs and name not in args.runs:
            continue
        run = folder / name
        if read_report(run) is None:
            common = [f"output={run}", f"data.path={args.data}", f"train.seed={seed}"]
            settings = [*common, *settings, *args.settings]
            command(args, "train", f"cifar10/{recipe}", "--resume", "--quiet", *settings, log=run)
        if read_report(run) is None:
            return [run]
        if name == "teacher" and not (run / "pseudo.parquet").exists():
            command(args, "pseudo-label", run, "--out", run / "pseudo.parquet", log=run)
    return []


def command(args: argparse.Namespace, *arguments: object, log: Path) -> None:
    """Run `robust-accel` with one thread, its output in a log beside the run."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.with_suffix(".log").open("a") as file:
        subprocess.run(
            [sys.executable, "-m", "robust_accel", *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
            stdout=file,
            stderr=file,
            check=False,
        )


def table(args: argparse.Namespace) -> str:
    """Markdown; what is compared with is the first run."""
    reports = {
        name: {s: r for s in args.seeds if (r := read_report(seed_folder(args, s) / name))}
        for name in STUDIES[args.study](Path())
    }
    return markdown(accuracy_table(reports, baseline=next(iter(reports))))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    data = Path(os.environ.get("ROBUST_ACCEL_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("settings", nargs="*", help="for every run, as section.key=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", nargs="+", help="only these rows, and what they start from")
    parser.add_argument("--jobs", type=int, default=2, help="seeds trained at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads a run")
    parser.add_argument("--data", type=Path, default=data / "cifar10", help="CIFAR-10's folder")
    parser.add_argument("--output", type=Path, default=Path("runs/regimes"))
    parser.add_argument("--table", action="store_true", help="only print what is there")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    failed: list[Path] = []
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            failed = [run for runs in pool.map(lambda s: make(args, s), args.seeds) for run in runs]
    for run in failed:
        print(f"failed: see {run.with_suffix('.log')}", file=sys.stderr)
    print(table(args))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
