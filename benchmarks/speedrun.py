"""The speedrun: how robust does ten minutes of training make a network, on two CPU cores?

CIFAR-10, L-inf, 8/255: standard AutoAttack on 1,000 test images, the mean over five seeds. Seconds
are those of the training's steps, not of reading images, of validation and of what is measured.
All that a record needs is in this file.

    .venv/bin/python benchmarks/speedrun.py [--seeds 5] data.path=FOLDER
    .venv/bin/python benchmarks/speedrun.py --device cuda train.epochs=20
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from robust_accel import load_run
from robust_accel.statistics import t_interval

BUDGET = 600.0  # seconds
RECIPE = """
base: cifar10/_cifar10
data: {augment: flip}
objective: {name: adversarial}
optimizer: {name: sgd, lr: 0.2, momentum: 0.9, weight_decay: 5e-4}
schedule: {name: onecycle}
evaluate: {autoattack: standard, autoattack_images: 1000, train_images: null, batch_size: 250}
"""
DEVICES = {
    "cpu": """
model: {name: preact_resnet18, options: {depth: 10, width: 24, stem_stride: 2, act_layer: silu}}
attack: {name: n-fgsm, eps: 8/255, noise_scale: 1.0}
train: {epochs: 8, batch_size: 128, channels_last: true, select: last, ema_decay: 0.995}
""",
    "cuda": """
model: {name: preact_resnet18, options: {act_layer: silu}}
attack: {name: n-fgsm, eps: 8/255, noise_scale: 2.0}
train: {epochs: 20, batch_size: 128, channels_last: true, precision: bf16, ema_decay: 0.999}
""",
}
LAUNCH = {
    "cpu": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"],
    "cuda": ["-m"],
}


def train(recipe: Path, device: str, seed: int, settings: list[str], output: Path) -> None:
    """By two processes of a thread each, which do more than one of two."""
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
    command = [sys.executable, *LAUNCH[device], "robust_accel", "train", str(recipe)]
    more = [f"train.seed={seed}", f"output={output}", *settings]
    subprocess.run([*command, *more], env=os.environ | environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", help="over the recipe's, as section.key=value")
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="of the runs; none are kept when not given")
    given = parser.parse_args()
    print("| seed | seconds | clean (%) | PGD-20 (%) | AutoAttack (%) |\n|---|---|---|---|---|")
    reached, seconds = [], []
    with tempfile.TemporaryDirectory() as place:
        recipe = Path(place, "speedrun.yaml")
        recipe.write_text(RECIPE + DEVICES[given.device])
        for seed in range(given.seeds):
            folder = (given.output or Path(place)) / f"speedrun-seed{seed}"
            train(recipe, given.device, seed, given.settings, folder)
            run = load_run(folder)
            seconds.append(run.report["train_seconds_per_epoch"] * run.report["epochs"])
            found = [100 * one.accuracy for one in (run.clean, run.pgd, run.autoattack)]
            reached.append(found[-1])
            cells = [f"{seed}", f"{seconds[-1]:.0f}", *(f"{one:.2f}" for one in found)]
            print("|", " | ".join(cells), "|", flush=True)
    if given.seeds > 1:
        mean = t_interval(reached)
        print(f"AutoAttack {mean.mean:.2f}% [{mean.low:.2f}, {mean.high:.2f}]")
    print(f"at most {max(seconds):.0f} s of training on {run.report['hardware']}")
    if given.device == "cpu" and max(seconds) > BUDGET:
        print(f"no record: it took more than {BUDGET:.0f} s")


if __name__ == "__main__":
    main()
