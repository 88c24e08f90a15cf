"""Processes that torchrun has started again meet apart from those before them."""

import os
from datetime import timedelta

import torch.distributed as dist

_USED = "robust_accel/used"


def launchers_store(timeout: float) -> dist.Store:
    """The store by which the processes of ``MASTER_ADDR`` have found one another."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=timeout)
    return dist.TCPStore(*address, timeout=limit, wait_for_workers=False)


def mark_used(store: dist.Store) -> None:
    """Say that processes have met by this store."""
    store.set(_USED, "")


def join_after_restart(backend: str, timeout: float) -> None:
    """Make the default group, where the launcher's store still has what a past attempt has left.

    torchrun's static rendezvous, which is Accelerate's default, keeps one store for all attempts:
    processes would find the addresses of those that are gone. Others make a new one each time.

    Args:
        backend: Of torch: what Accelerate would choose.
        timeout: Seconds, of the group.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store = launchers_store(timeout)
    if store.check([_USED]) and not dist.is_initialized():
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"robust_accel/attempt/{attempt}", store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(seconds=timeout),
        )
