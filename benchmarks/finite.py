"""What watching for NaN and Inf costs, as a share of a training step: processor time, one process.

    OMP_NUM_THREADS=1 python benchmarks/finite.py

A step is PGD-7 and its update by LAMB; the watch of a step, by train.on_nonfinite, and the check
that is made once a checkpoint, validation or log line, are timed alone.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from robust_accel import LAMB, PGD, RobustModel
from robust_accel.models import ModelSettings, create_classifier
from robust_accel.recipe import TrainSettings
from robust_accel.run_folder import RunFolder
from robust_accel.training.checkpoint import Progress
from robust_accel.training.finite import Watch

CASES = {
    "quickstart: wide_resnet10_1, 64 images 1x8x8": ("wide_resnet10_1", (64, 1, 8, 8)),
    "CIFAR-10: preact_resnet18, 8 images 3x32x32": ("preact_resnet18", (8, 3, 32, 32)),
}
_NOWHERE = RunFolder(Path("nowhere"))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median processor time, after one call that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return sorted(times)[repeats // 2]


def measure(name: str, shape: tuple[int, ...]) -> dict[str, float]:
    """Seconds of a step, of its watch in both modes, and of a check."""
    network = create_classifier(ModelSettings(name=name), num_classes=10, in_chans=shape[1])
    model = RobustModel(network, PGD(eps="8/255", num_steps=7))
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(LAMB(model.parameters(), lr=0.01))
    x, labels = torch.rand(shape), torch.randint(10, shape[:1])
    model.train()

    def step() -> torch.Tensor:
        loss = model(x, labels)["loss"]
        loss.backward()
        optimizer.step()
        return loss

    found, loss = {"step": seconds(step, 3)}, step()
    for mode in ("stop", "skip"):
        settings = TrainSettings(epochs=1, batch_size=1, on_nonfinite=mode)
        watch = Watch(accelerator, settings, _NOWHERE, Progress(), model, optimizer, None)
        watch.start()

        def watched(watch: Watch = watch) -> None:
            watch.allows(loss, None)
            watch.settle()

        found[mode] = seconds(watched, 50)
        found["check"] = seconds(watch.check, 50)
    return found


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.manual_seed(0)
    print("| a step | seconds | stop | skip | a check |\n| --- | --- | --- | --- | --- |")
    for title, (name, shape) in CASES.items():
        found = measure(name, shape)
        shares = (f"{100 * found[key] / found['step']:.2f}%" for key in ("stop", "skip", "check"))
        print(f"| {title} | {found['step']:.3f} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
