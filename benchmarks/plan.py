"""Does a step take what `robust-accel plan` says? Planned by one process, then trained on nodes.

The nodes are network namespaces behind one switch, each link held to a rate (see on_nodes.py), one
process with one thread each; there should be a core for each. Bytes are the training's own count,
seconds are means over its steps but for the first ones. Needs Linux, root, `ip` and `tc`.

python benchmarks/plan.py [--nodes 2] [--rates 1gbit 100mbit] [--steps 30] [--engines DDP FSDP2]
"""

import argparse
import itertools
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
from robust_accel.planning.estimate import PROTOCOLS, Engine, Estimate, Job, engines, estimates
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


LAUNCHED = {
    "DDP": {},
    "FSDP2": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicBlock", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
}  # fmt: skip


def trained(engine: str, protocol: str, nodes: int, rate: str, steps: int) -> tuple[float, float]:
    """Bytes that a node sent in a step, and a step's seconds."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = [sys.executable, str(here / "on_nodes.py"), "--nodes", str(nodes), "--rate", rate]
        command += ["-m", "robust_accel", "train", RECIPE, *SETTINGS, *AS_SETTINGS[protocol]]
        command += [f"train.max_steps={FIRST + steps}", f"output={run}"]
        env = os.environ | LAUNCHED[engine]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        report = json.loads((run / "report.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [
        line["images_per_second"]
        for line in lines
        if line["step"] > FIRST and "images_per_second" in line
    ]
    weights = report["applied"].get("bytes_of_weights_sent", 0)
    return report["bytes_sent_per_step"] + weights, sum(64 / r for r in rates) / len(rates)


def planned(cost: Cost, nodes: int, rate: str) -> dict[tuple[str, str], tuple[Engine, Estimate]]:
    job = Job(cost, Machines(nodes, 1), _rate(rate), 64 // nodes, timed_on=torch.device("cpu"))
    held = {one.name: one for one in engines(job, PROTOCOLS["fp32"])}
    found = estimates(job, list(held.values()), PROTOCOLS)
    return {(one.engine, one.protocol): (held[one.engine], one) for one in found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rates", nargs="+", default=["1gbit", "100mbit"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--protocols", nargs="+", choices=AS_SETTINGS, default=[*AS_SETTINGS])
    parser.add_argument("--engines", nargs="+", choices=LAUNCHED, default=["DDP"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = load_recipe(RECIPE, SETTINGS)
    cost = measure(recipe, SHAPE, CLASSES, 64 // options.nodes, torch.device("cpu"))
    head = ("link", "engine", "gradients", "bytes a step: planned, sent")
    head += ("seconds: planned, taken", "ratio")
    print(f"| {' | '.join(head)} |")
    print("|---|---|---|---|---|---|")
    for rate in options.rates:
        plan = planned(cost, options.nodes, rate)
        for engine, protocol in itertools.product(options.engines, options.protocols):
            sent, seconds = trained(engine, protocol, options.nodes, rate, options.steps)
            held, one = plan[engine, protocol]
            said = one.traffic.sent + held.leaving
            print(
                f"| {rate} | {engine} | {protocol} | {said:,.0f}, {sent:,.0f} "
                f"({said / sent - 1:+.2%}) | {one.step:.3f}, {seconds:.3f} "
                f"| {one.step / seconds:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
