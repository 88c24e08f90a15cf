"""How long does AutoAttack take? Plain `pyautoattack`, ours on one process, ours on two.

The same run, images, attacks and number of threads, on the CPU: plain once, then ours, one after
another, so leave the machine alone. Ours attacks in fp32 unless --search bf16 is given. In L1, and
of rand, the two differ in more than their speed: neither is compared. The verdicts are printed
beside the times: seeds of later batches differ, the rest is the same.
Ours keep the outcome of every image under --output, and must agree on any number of processes.

python benchmarks/autoattack.py runs/cifar10/cpu --images 200
python benchmarks/autoattack.py runs/cifar10/cpu --images 1000 --version standard --threads 2
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from pyautoattack import AutoAttack

from robust_accel.data import load_test
from robust_accel.evaluation.autoattack import ATTACKS_OF
from robust_accel.evaluation.ledger import read_records
from robust_accel.recipe import Recipe
from robust_accel.run_folder import RunFolder
from robust_accel.trained_model import load_model, recipe_of

VERSIONS = ("quick", "standard")


def norm_of(recipe: Recipe) -> str:
    """The reference's name of the norm, where its AutoAttack is the same as ours."""
    names = {"linf": "Linf", "l2": "L2"}
    if recipe.evaluate.norm not in names:
        raise SystemExit(f"evaluate.norm: {recipe.evaluate.norm} is not compared: linf and l2 are")
    return names[recipe.evaluate.norm]


def plain(args: argparse.Namespace) -> tuple[float, float]:
    """Seconds and robust accuracy of the reference, in this process."""
    torch.set_num_threads(args.threads)
    recipe = recipe_of(str(args.run), (), required=("model", "data", "evaluate"))
    norm = norm_of(recipe)
    test = load_test(recipe.data)
    images, num_classes = test.images, test.num_classes
    classifier = load_model(args.run).requires_grad_(False)
    ((x, labels),) = images.batches([torch.arange(args.images)], torch.device("cpu"))
    attack = AutoAttack(
        classifier,
        norm=norm,
        eps=recipe.evaluate.eps,
        version="custom",
        attacks=list(ATTACKS_OF[args.version]),
        seed=0,
    )
    attack.apgd.n_restarts = attack.fab.n_restarts = 1
    targets = min(9, num_classes - 1)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
    start = time.perf_counter()
    x_adv, _ = attack.run_standard_evaluation(x, labels, batch_size=args.batch_size)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        robust = (classifier(x_adv).argmax(dim=1) == labels).double().mean().item()
    return seconds, robust


def ours(
    args: argparse.Namespace, folder: RunFolder, num_processes: int, search: str
) -> tuple[float, float]:
    """The same of the evaluate command, as it reports them: loading is not counted."""
    if folder.path.exists():
        raise SystemExit(f"{folder.path}: exists already, and what is known is not attacked again")
    command = [sys.executable, "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "ACCELERATE_USE_CPU": "true"}
    if num_processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command += ["accelerate.commands.launch", "--multi_gpu", "--main_process_port", port]
        command += ["--num_processes", str(num_processes), "-m"]
    command += ["robust_accel", "evaluate", str(args.run), f"output={folder.path}"]
    command += ["evaluate.pgd=null", f"evaluate.autoattack={args.version}"]
    command += [f"evaluate.images={args.images}", f"evaluate.autoattack_images={args.images}"]
    command += [f"evaluate.batch_size={args.batch_size}", f"evaluate.search={search}"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    (found,) = (r for r in read_records(folder.path) if r["attack"]["name"] == "autoattack")
    return found["wall_seconds"], found["accuracy"]


def broken(folder: RunFolder) -> set[int]:
    """The images that some attack broke, or that were wrong before."""
    (found,) = (r for r in read_records(folder.path) if r["attack"]["name"] == "autoattack")
    columns = [found["outcomes"][key] for key in ("index", "label", "prediction")]
    return {index for index, label, prediction in zip(*columns, strict=True) if label != prediction}


def row(args: argparse.Namespace, name: str, base: float, seconds: float, robust: float) -> None:
    print(
        f"| {name} | {seconds:.1f} | {60 * args.images / seconds:.1f} | {base / seconds:.2f} "
        f"| {100 * robust:.2f} |",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--output", type=Path, default=Path("runs/autoattack"), help="kept there")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--version", choices=VERSIONS, default="standard")
    parser.add_argument("--batch-size", type=int, default=50, help="images a unit")
    parser.add_argument("--threads", type=int, default=1, help="threads a process")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--search", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    args = parser.parse_args()
    print(f"{args.version} on {args.images} images, {args.threads} thread(s) a process")
    print("| | seconds | images a minute | times plain | robust accuracy (%) |")
    print("|---|---|---|---|---|", flush=True)
    base, robust = plain(args)
    row(args, "plain pyautoattack", base, base, robust)
    for search in args.search:
        outcomes = []
        for number in args.processes:
            folder = RunFolder(args.output / f"{search}-{number}")
            seconds, robust = ours(args, folder, number, search)
            outcomes.append(broken(folder))
            same = "" if outcomes[0] == outcomes[-1] else ": NOT the same images as before"
            name = f"ours, {number} process(es), search in {search}{same}"
            row(args, name, base, seconds, robust)
    return 0


if __name__ == "__main__":
    sys.exit(main())
