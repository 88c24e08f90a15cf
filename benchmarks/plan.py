"""Does a step take what `robust-accel plan` says? Planned by one process, then trained on nodes.

The nodes are network namespaces behind one switch, each link held to a rate (see on_nodes.py), one
process with one thread each; there should be a core for each. Bytes are the training's own count,
seconds are means over its steps but for the first ones. Needs Linux, root, `ip` and `tc`.

python benchmarks/plan.py [--nodes 2] [--rates 1gbit 100mbit] [--steps 30]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from robust_accel.__main__ import _rate
from robust_accel.comm.traffic import Machines
from robust_accel.planning.cost import Cost, measure
from robust_accel.planning.estimate import PROTOCOLS, Estimate, estimates
from robust_accel.recipe import load_recipe

RECIPE = "quickstart"
SETTINGS = (
    "model.name=resnet18", "train.batch_size=64", "train.epochs=50", "train.log_every=5",
    "attack.num_steps=3", "attack.step_size=0.1", "data.train_size=640", "evaluate.images=10",
    "evaluate.autoattack=null", "evaluate.pgd=null", "evaluate.sanity=false",
)  # fmt: skip
SHAPE, CLASSES = (1, 8, 8), 10
FIRST = 10  # steps that are not counted: buckets are rebuilt, kernels compiled
AS_SETTINGS = {
    "fp32": ("communication.name=allreduce",),
    "fp16": ("communication.name=allreduce", "communication.dtype=fp16"),
    "8 bits, 1 side": ("communication.name=qsgd", "communication.sides=1"),
    "8 bits, 2 sides": ("communication.name=qsgd",),
    "4 bits, 2 sides": ("communication.name=qsgd", "communication.bits=4"),
}


def trained(protocol: str, nodes: int, rate: str, steps: int) -> tuple[float, float]:
    """Bytes that a node sent in a step, and a step's seconds."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = [sys.executable, str(here / "on_nodes.py"), "--nodes", str(nodes), "--rate", rate]
        command += ["-m", "robust_accel", "train", RECIPE, *SETTINGS, *AS_SETTINGS[protocol]]
        command += [f"train.max_steps={FIRST + steps}", f"output={run}"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        report = json.loads((run / "report.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [
        line["images_per_second"]
        for line in lines
        if line["step"] > FIRST and "images_per_second" in line
    ]
    return report["bytes_sent_per_step"], sum(64 / r for r in rates) / len(rates)


def planned(cost: Cost, nodes: int, rate: str) -> dict[str, Estimate]:
    machines, images = Machines(nodes, 1), 64 // nodes
    cpu = torch.device("cpu")
    found = estimates(cost, machines, _rate(rate), images, 1, PROTOCOLS, cpu)
    return {one.protocol: one for one in found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--protocols", nargs="+", choices=AS_SETTINGS, default=[*AS_SETTINGS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(RECIPE, SETTINGS)
    cost = measure(recipe, SHAPE, CLASSES, 64 // options.nodes, torch.device("cpu"))
    print("| link | gradients | bytes a step: planned, sent | seconds: planned, taken | ratio |")
    print("|---|---|---|---|---|")
    for rate in options.rates:
        plan = planned(cost, options.nodes, rate)
        for protocol in options.protocols:
            sent, seconds = trained(protocol, options.nodes, rate, options.steps)
            one = plan[protocol]
            print(
                f"| {rate} | {protocol} | {one.traffic.sent:,}, {sent:,.0f} "
                f"({one.traffic.sent / sent - 1:+.2%}) | {one.step:.3f}, {seconds:.3f} "
                f"| {one.step / seconds:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
