"""Processes that torchrun has started again meet apart from those before them."""

import hashlib
import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

_PAUSE = 1.0  # seconds at most between two looks


def launchers_store(timeout: float) -> dist.Store:
    """The store by which the processes of ``MASTER_ADDR`` have found one another."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=timeout)
    return dist.TCPStore(*address, timeout=limit, wait_for_workers=False)


def join_restartable(backend: str, timeout: float) -> None:
    """Make the default group, where the launcher's store may have what a past attempt has left.

    Under ``--max_restarts`` torchrun keeps one store for all attempts: processes would find the
    addresses of those that are gone. Nor do they know their attempt: each launcher counts for
    itself, only some of the restarts, and one that takes a lost one's place begins at 0.

    Args:
        backend: Of torch: what Accelerate would choose.
        timeout: Seconds, to meet in and of the group.

    Raises:
        DistStoreError: Not all have come.
    """
    keeps = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if not keeps or restarts == 0 or size == 1 or dist.is_initialized():
        return
    store = launchers_store(timeout)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(meeting_place(store, rank, size, timeout), store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )


def meeting_place(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """A prefix in a store for the processes that are there now, whatever others have left in it.

    Each leaves a word of its own. The first offers all words that it finds, anew when one of them
    changes. An offer with one's own word is accepted; one that all have accepted is the place: who
    is gone accepts none.

    Args:
        rank: Of this process among ``size``.
        timeout: Seconds to wait for the others.

    Raises:
        DistStoreError: Not all have come.
    """
    meeting = dist.PrefixStore(f"robust_accel/meeting/{size}", store)
    own, offer, accepted = secrets.token_hex(8), "", ""
    words = [f"word/{other}" for other in range(size)]
    meeting.set(words[rank], own)
    until, pause = time.monotonic() + timeout, _PAUSE / 100
    while True:
        if rank == 0:
            if meeting.check(words):
                found = ",".join(word.decode() for word in meeting.multi_get(words))
                if found != offer:
                    offer = found
                    meeting.set("offer", offer)
        elif meeting.check(["offer"]):
            offer = meeting.get("offer").decode()
        place = hashlib.sha256(offer.encode()).hexdigest()[:16]
        acceptances = [f"{place}/{other}" for other in range(size)]
        if offer != accepted and offer.split(",")[rank] == own:
            accepted = offer
            meeting.set(acceptances[rank], "")
        if accepted and offer == accepted and meeting.check(acceptances):
            return f"robust_accel/group/{place}"
        if time.monotonic() > until:
            gone = [
                str(other)
                for other in range(size)
                if other != rank and not meeting.check([acceptances[other]])
            ]
            raise dist.DistStoreError(f"no answer from {', '.join(gone[:8])}")
        time.sleep(pause)
        pause = min(1.5 * pause, _PAUSE)
