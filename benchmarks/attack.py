"""What an attack costs beside a plain step of training, eager and compiled. Prints a table.

    python benchmarks/attack.py [--model preact_resnet18_w16] [--batch 64] [--repeats 7]

A step is PGD with `--steps` steps, forward, backward. torch.compile's AOTAutograd differentiates in
every input that requires a gradient: `weights differentiated` is the attack on a compiled model
whose parameters are left as they are, which this package does not do: it freezes them meanwhile.
Milliseconds are the median over repetitions in which all take turns, on one thread.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import timm
import torch
from torch.nn.functional import cross_entropy

import robust_accel.models  # noqa: F401  (registers the CIFAR models with timm)
from robust_accel import PGD, RobustModel
from robust_accel.attack_context import attack_context


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="preact_resnet18_w16", help="a timm model")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.rand(args.batch, 3, args.size, args.size)
    labels = torch.arange(args.batch) % 10
    attack = PGD(num_steps=args.steps)

    def robust(compiled: bool) -> RobustModel:
        torch.manual_seed(0)
        model = timm.create_model(args.model, num_classes=10)
        if compiled:
            model.compile()
        return RobustModel(model, attack)

    eager, fused = robust(False), robust(True)

    def unfrozen() -> None:
        classifier = fused.classifier
        with attack_context(classifier, "eval", freeze=False):
            attack(lambda z: cross_entropy(classifier(z), labels, reduction="none"), x)

    jobs: dict[str, Callable[[], object]] = {
        "plain step, eager": lambda: cross_entropy(eager.classifier(x), labels).backward(),
        "attack, eager": lambda: eager.perturb(x, labels),
        "plain step, compiled": lambda: cross_entropy(fused.classifier(x), labels).backward(),
        "attack, compiled": lambda: fused.perturb(x, labels),
        "attack, compiled, weights differentiated": unfrozen,
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(args.repeats + 1):
        for name, job in jobs.items():
            spent = seconds(job)
            if repeat:  # the first compiles
                times[name].append(spent)
    print(f"{args.model}, {args.batch} images of {args.size}, PGD-{args.steps}, one thread")
    print("| what | ms | of the plain eager step |")
    print("| --- | --- | --- |")
    plain = median(times["plain step, eager"])
    for name, t in times.items():
        print(f"| {name} | {1e3 * median(t):.0f} | {median(t) / plain:.2f} |")


if __name__ == "__main__":
    main()
