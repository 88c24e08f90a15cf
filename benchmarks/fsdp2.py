"""What FSDP2 costs and saves in a step of adversarial training: prints a table.

Usage: python benchmarks/fsdp2.py [--model vit_base_patch16_224] [--steps 3] [--attack-steps 10]

Real processes, one thread each, on one machine, fp32, LAMB: copies (DDP), pieces, and pieces that
stay gathered for the attack (``train.keep_gathered``). Memory is what a process's tensors take at
most during a step, DDP's buckets with them: on CPUs what stays from step to step and the profiler's
allocations (the least of ``--steps``), on GPUs the allocator's count. Bytes are a process's in one
step: of weights as a ring sends them, of gradients as the protocol does. On one machine the network
costs nothing, so seconds tell of copies and waits alone.
"""

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.distributed as dist
from _clock import synchronize
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from robust_accel import PGD, RobustModel, compress_gradients
from robust_accel.models import normalized
from robust_accel.optim import LAMB
from robust_accel.optim.sharded import local
from robust_accel.training.launcher import Sharding
from robust_accel.training.shards import Shards

WAYS = ("copies (DDP)", "pieces", "pieces, gathered once")


def measure(rank: int, way: str, given: argparse.Namespace, store: str) -> None:
    """One process's part; the first one writes the figures."""
    torch.set_num_threads(1)
    address = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": given.processes}
    os.environ |= {key: str(value) for key, value in address.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": given.port}
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    accelerator = Accelerator()
    device = accelerator.device
    options: Any = {"img_size": given.size, "num_classes": 10}
    network = timm.create_model(given.model, **options)
    classifier = normalized(network, ("here", {"mean": 0.5, "std": 0.25})).to(device)
    attack = PGD(eps="4/255", num_steps=given.attack_steps)
    shards, prepared = None, accelerator
    if way != WAYS[0]:
        sharding = Sharding((given.layer,), True, False)
        shards = Shards(sharding, classifier, None, accelerator, "no", way == WAYS[2])
        prepared = shards
    robust = RobustModel(classifier, attack)
    optimizer: Any = LAMB(network.parameters(), lr=0.001)
    model: nn.Module
    model, optimizer = prepared.prepare(robust, optimizer)
    compression = compress_gradients(model)
    x = torch.rand(given.images, 3, given.size, given.size, device=device)
    labels = torch.randint(10, (given.images,), device=device)

    def step() -> float:
        dist.barrier()
        start = time.perf_counter()
        model.train()
        accelerator.backward(model(x, labels)["loss"])
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - start

    def sent() -> tuple[int, int]:
        return compression.meter.bytes_sent, compression.gathered.bytes_sent

    step()
    seconds = statistics.median(step() for _ in range(given.steps))
    before = sent()
    step()
    after = sent()
    added = min(most_added(step) for _ in range(given.steps))
    if rank == 0:
        peak = staying(model, optimizer) + added
        if on_gpu:
            peak = torch.cuda.max_memory_allocated()
        torch.save([seconds, peak, *(b - a for a, b in zip(before, after, strict=True))], store)
    dist.barrier()
    compression.close()
    dist.destroy_process_group()


def staying(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What there is between two steps, in bytes: DDP's buckets are a copy of the gradients."""
    held = [*model.parameters(), *model.buffers()]
    held += [v for kept in optimizer.state.values() for v in kept.values()]
    if isinstance(model, DistributedDataParallel):
        held += [p for p in model.parameters() if p.requires_grad]
    return sum(local(t, t).nbytes for t in held)


def most_added(step: Callable[[], float]) -> int:
    """The most that tensors hold in a step beyond what they held at its start, in bytes.

    The profiler does not see what gloo's own thread is the last to free: one step may count more
    than there is, never less.
    """
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--layer", default="Block", help="class of the modules that are cut")
    parser.add_argument("--size", type=int, default=64, help="of the images, pixels")
    parser.add_argument("--images", type=int, default=4, help="a process")
    parser.add_argument("--attack-steps", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="timed; as many again for memory")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    size = sum(p.numel() for p in timm.create_model(given.model, img_size=given.size).parameters())
    print(
        f"{given.model}, {size / 1e6:.1f} M parameters, {given.processes} processes, "
        f"PGD-{given.attack_steps}, {given.images} images of {given.size} pixels a process\n"
    )
    print("| weights | s a step | peak memory (MiB) | gradients sent (MB) | weights sent (MB) |")
    print("| --- | --- | --- | --- | --- |")
    context = multiprocessing.get_context("spawn")
    for number, way in enumerate(WAYS):
        given.port = str(29600 + number)
        with tempfile.TemporaryDirectory() as folder:
            store = f"{folder}/found.pt"
            arguments = [(rank, way, given, store) for rank in range(given.processes)]
            processes = [context.Process(target=measure, args=of_rank) for of_rank in arguments]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            seconds, held, sent, weights = torch.load(store)
        cells = [
            f"{seconds:.2f}",
            f"{held / 2**20:.0f}",
            f"{sent / 1e6:.1f}",
            f"{weights / 1e6:.1f}",
        ]
        print("|", " | ".join([way, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
