"""Time of one optimizer step on a model's parameters: prints a table.

Usage: python benchmarks/lamb.py [--model resnet50] [--threads 1 2] [--repeats 10]
       python benchmarks/lamb.py --device cuda --threads 1 --repeats 50
       python benchmarks/lamb.py --shards 2  # pieces as FSDP2 has, on so many processes

Our LAMB in its forms, timm's in its fastest, and torch's fused AdamW, on random gradients. The
optimizers take turns within each repeat, so that other work on the machine slows all alike. Wall
clock, the process's own CPU time (all threads), and ratios of medians to our LAMB as it is by
default. Each number of threads runs in a process of its own.
"""

import argparse
import contextlib
import io
import multiprocessing
import statistics
import sys
import tempfile
import time

import timm
import timm.optim
import torch
import torch.distributed as dist
from _clock import synchronize
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
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


def measure_shards(rank: int, model: str, num_processes: int, repeats: int, store: str) -> None:
    """Print the rows of whole parameters on each process (DDP), and of a piece on each (FSDP2)."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num_processes
    )
    mesh = init_device_mesh("cpu", (num_processes,))
    with contextlib.redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):
        whole = make_optimizers(model, torch.device("cpu"))["LAMB"]
    pieces = []
    for param in whole.param_groups[0]["params"]:
        piece = nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)]))
        piece.grad = distribute_tensor(param.grad, mesh, [Shard(0)])
        pieces.append(piece)
    optimizers = {"whole, on each": whole, "in pieces": LAMB(pieces, lr=1e-3, weight_decay=0.01)}
    wall: dict[str, list[float]] = {name: [] for name in optimizers}
    for repeat in range(repeats + 1):  # the first warms up
        for name, optimizer in optimizers.items():
            dist.barrier()
            start = time.perf_counter()
            optimizer.step()
            dist.barrier()
            if repeat:
                wall[name].append(1e3 * (time.perf_counter() - start))
    base = statistics.median(wall["whole, on each"])
    if rank == 0:
        print(f"| {num_processes} processes | median ms | least ms | times whole |")
        print("|---|---|---|---|")
        for name, values in wall.items():
            median = statistics.median(values)
            print(f"| {name} | {median:.2f} | {min(values):.2f} | {median / base:.2f} |")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", help="a model of timm")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--shards", type=int, help="processes, on CPUs")
    args = parser.parse_args()
    if args.shards:
        with tempfile.TemporaryDirectory() as folder:
            rest = (args.model, args.shards, args.repeats, f"{folder}/store")
            torch.multiprocessing.spawn(measure_shards, rest, nprocs=args.shards)
        return
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
