"""Runs a function in several real gloo processes, once, under a time limit."""

import gc
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 150  # for a machine that is busy with other things; the work itself takes seconds
COLLECTIVE_TIMEOUT_S = 40


def run(scenarios: list[Callable], world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Each scenario runs in turn on every rank; returns {name: result} of each rank.

    A scenario that raises leaves its traceback under "error" and ends its rank's run.
    """
    context = mp.start_processes(
        _main,
        (world_size, folder, scenarios),
        nprocs=world_size,
        join=False,
        daemon=True,
        start_method="forkserver",
    )
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes still run after {TIMEOUT_S} s: {progress(folder)}")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(world_size)]


def progress(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.glob("*.now")}


def _main(rank: int, world_size: int, folder: Path, scenarios: list[Callable]) -> None:
    gc.freeze()  # DeepSpeed looks for garbage at every start: what is imported is none
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    results: dict[str, Any] = {}
    for scenario in scenarios:
        (folder / f"rank{rank}.now").write_text(scenario.__name__)
        try:
            torch.manual_seed(0)
            results[scenario.__name__] = scenario(rank, world_size)
        except Exception:
            results["error"] = traceback.format_exc()
            break
    torch.save(results, folder / f"rank{rank}.pt")
