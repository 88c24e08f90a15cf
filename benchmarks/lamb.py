"""Time of one optimizer step on a model's parameters, on the CPU: prints a table.

Usage: python benchmarks/lamb.py [--model resnet50] [--threads 1 2] [--repeats 10]

Our LAMB in its forms, timm's in its fastest, and torch's fused AdamW, on random gradients. The
optimizers take turns within each repeat, so that other work on the machine slows all alike. Wall
clock, the process's own CPU time (all threads), and ratios of medians to the fused LAMB. Each
number of threads runs in a process of its own.
"""

import argparse
import multiprocessing
import statistics
import time

import timm
import timm.optim
import torch
from torch import nn
from torch.optim import Optimizer

from robust_accel.optim import LAMB


def make_optimizers(model: str) -> dict[str, Optimizer]:
    """One set of parameters and gradients, which all of them update."""
    with torch.device("meta"):  # shapes only: initialising takes longer than measuring
        shapes = [param.shape for param in timm.create_model(model).parameters()]
    params = [nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    num_elements = sum(param.numel() for param in params)
    print(f"{model}: {len(params)} tensors, {num_elements / 1e6:.1f} M elements")
    options = {"lr": 1e-3, "weight_decay": 0.01}
    return {
        "LAMB fused": LAMB(params, fused=True, **options),
        "LAMB plain": LAMB(params, fused=False, **options),
        # without its clipping of the global gradient norm: a pass more, which ours has not
        "timm Lamb foreach": timm.optim.Lamb(params, max_grad_norm=None, foreach=True, **options),
        "torch AdamW fused": torch.optim.AdamW(params, fused=True, **options),
    }


def measure(model: str, num_threads: int, repeats: int) -> None:
    """Print the rows of one number of threads."""
    torch.set_num_threads(num_threads)
    optimizers = make_optimizers(model)
    for optimizer in optimizers.values():
        optimizer.step()
    wall: dict[str, list[float]] = {name: [] for name in optimizers}
    cpu: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            optimizer.step()
            wall[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - cpu_start))
    base = statistics.median(wall["LAMB fused"])
    print(f"| {num_threads} thread(s) | median ms | least ms | least CPU ms | times LAMB fused |")
    print("|---|---|---|---|---|")
    for name, values in wall.items():
        median = statistics.median(values)
        numbers = f"{median:.1f} | {min(values):.1f} | {min(cpu[name]):.1f} | {median / base:.2f}"
        print(f"| {name} | {numbers} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="a model of timm")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    for num_threads in args.threads:
        process = spawn.Process(target=measure, args=(args.model, num_threads, args.repeats))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
