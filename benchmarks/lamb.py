"""Time of one optimizer step on a model's parameters: prints a table.

Usage: python benchmarks/lamb.py [--model resnet50] [--threads 1 2] [--repeats 10]
       python benchmarks/lamb.py --device cuda --threads 1 --repeats 50

Our LAMB in its forms, timm's in its fastest, and torch's fused AdamW, on random gradients. The
optimizers take turns within each repeat, so that other work on the machine slows all alike. Wall
clock, the process's own CPU time (all threads), and ratios of medians to our LAMB as it is by
default. Each number of threads runs in a process of its own.
"""

import argparse
import multiprocessing
import statistics
import time

import timm
import timm.optim
import torch
from _clock import synchronize
from torch import nn
from torch.optim import Optimizer

from robust_accel.optim import LAMB


def make_optimizers(model: str, device: torch.device) -> dict[str, Optimizer]:
    """One set of parameters and gradients, which all of them update."""
    with torch.device("meta"):  # shapes only: initialising takes longer than measuring
        shapes = [param.shape for param in timm.create_model(model).parameters()]
    params = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    num_elements = sum(param.numel() for param in params)
    print(f"{model}: {len(params)} tensors, {num_elements / 1e6:.1f} M elements")
    options = {"lr": 1e-3, "weight_decay": 0.01}
    return {
        "LAMB": LAMB(params, **options),  # fused on a CPU, foreach on a GPU
        "LAMB plain": LAMB(params, fused=False, foreach=False, **options),
        # without its clipping of the global gradient norm: a pass more, which ours has not
        "timm Lamb foreach": timm.optim.Lamb(params, max_grad_norm=None, foreach=True, **options),
        "torch AdamW fused": torch.optim.AdamW(params, fused=True, **options),
    }


def measure(model: str, device: torch.device, num_threads: int, repeats: int) -> None:
    """Print the rows of one number of threads."""
    torch.set_num_threads(num_threads)
    optimizers = make_optimizers(model, device)
    for optimizer in optimizers.values():
        optimizer.step()
        synchronize(device)
    wall: dict[str, list[float]] = {name: [] for name in optimizers}
    cpu: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(repeats):
        for name, optimizer in optimizers.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            optimizer.step()
            synchronize(device)
            wall[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - cpu_start))
    base = statistics.median(wall["LAMB"])
    where = f"{num_threads} thread(s)"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    print(f"| {where} | median ms | least ms | least CPU ms | times LAMB |")
    print("|---|---|---|---|---|")
    for name, values in wall.items():
        median = statistics.median(values)
        numbers = f"{median:.2f} | {min(values):.2f} | {min(cpu[name]):.2f} | {median / base:.2f}"
        print(f"| {name} | {numbers} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="a model of timm")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    for num_threads in args.threads:
        process = spawn.Process(
            target=measure, args=(args.model, args.device, num_threads, args.repeats)
        )
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
