"""What an attack costs beside a plain step of training, eager and compiled. Prints a table.

    python benchmarks/attack.py [--model preact_resnet18_w16] [--batch 64] [--repeats 7]
    python benchmarks/attack.py --device cuda --bf16 --model preact_resnet18 --batch 512

A step is PGD with `--steps` steps, forward, backward. torch.compile's AOTAutograd differentiates in
every input that requires a gradient: `weights differentiated` is the attack on a compiled model
whose parameters are left as they are, which this package does not do: it freezes them meanwhile.
Milliseconds are the median over repetitions in which all take turns, on one thread; images a second
are those of the eager and the compiled step, attack and update's gradient together.
"""

import argparse
from collections.abc import Callable
from statistics import median

import timm
import torch
from _clock import seconds
from torch.nn.functional import cross_entropy

import robust_accel.models  # noqa: F401  (registers the CIFAR models with timm)
from robust_accel import PGD, RobustModel
from robust_accel.attack_context import attack_context


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="preact_resnet18_w16", help="a timm model")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--bf16", action="store_true", help="autocast, and channels_last")
    args = parser.parse_args()
    torch.set_num_threads(1)
    layout = torch.channels_last if args.bf16 else torch.contiguous_format
    x = torch.rand(args.batch, 3, args.size, args.size, device=args.device)
    x = x.to(memory_format=layout)
    labels = torch.arange(args.batch, device=args.device) % 10
    attack = PGD(num_steps=args.steps)

    def robust(compiled: bool) -> RobustModel:
        torch.manual_seed(0)
        model = timm.create_model(args.model, num_classes=10)
        if compiled:
            model.compile()
        return RobustModel(model, attack).to(args.device, memory_format=layout)

    eager, fused = robust(False), robust(True)

    def unfrozen() -> None:
        classifier = fused.classifier
        with attack_context(classifier, "eval", freeze=False):
            attack(lambda z: cross_entropy(classifier(z), labels, reduction="none"), x)

    jobs: dict[str, Callable[[], object]] = {
        "plain step, eager": lambda: cross_entropy(eager.classifier(x), labels).backward(),
        "attack, eager": lambda: eager.perturb(x, labels),
    }
    if not args.eager:
        jobs |= {
            "plain step, compiled": lambda: cross_entropy(fused.classifier(x), labels).backward(),
            "attack, compiled": lambda: fused.perturb(x, labels),
            "attack, compiled, weights differentiated": unfrozen,
        }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(args.repeats + 1):
        for name, job in jobs.items():
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                spent = seconds(job, args.device)
            if repeat:  # the first compiles
                times[name].append(spent)
    where = "one thread" if args.device.type == "cpu" else torch.cuda.get_device_name(args.device)
    precision = "bf16" if args.bf16 else "fp32"
    what = f"{args.model}, {args.batch} images of {args.size}, PGD-{args.steps}"
    print(f"{what}, {precision}, torch {torch.__version__}, {where}")
    print("| what | ms | of the plain eager step |")
    print("| --- | --- | --- |")
    plain = median(times["plain step, eager"])
    for name, t in times.items():
        print(f"| {name} | {1e3 * median(t):.1f} | {median(t) / plain:.2f} |")
    for how in ("eager",) if args.eager else ("eager", "compiled"):
        step = median(times[f"plain step, {how}"]) + median(times[f"attack, {how}"])
        print(f"{how}: {args.batch / step:,.0f} images a second")


if __name__ == "__main__":
    main()
