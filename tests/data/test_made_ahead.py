"""Batches that worker processes make beside the training: the same, and all ends with it."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import weights
from numbered_images import CPU, pair, pixels
from published_arrays import arrays, write

from robust_accel.data import DataSettings, MemoryImages, load_data
from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.run import train
from robust_accel.training.stopping import Stopped

FORKS = multiprocessing.get_start_method() == "fork"


def in_memory(num_workers: int, **options: Any) -> MemoryImages:
    x = torch.randint(0, 256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    settings = DataSettings(path="x", num_workers=num_workers, **options)
    return MemoryImages.of(x, torch.arange(60) % 3, settings, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "rand", "augment": "resized_crop_flip", "cutout": 2},
        {"policy": "trivial", "augment": "crop_flip"},
        {"policy": "auto_cifar10"},
    ],
    ids=str,
)
def test_any_number_of_workers_makes_the_same(options: dict[str, Any]) -> None:
    order = [part.tolist() for part in torch.randperm(60).split(7)]
    state = torch.get_rng_state()
    alone, one, two = (pixels(in_memory(n, **options), order, 4) for n in (0, 1, 2))
    assert alone.equal(one) and alone.equal(two)
    assert pixels(in_memory(2, **options), order[5:], 4).equal(
        alone[sorted(i for part in order[5:] for i in part)]
    )
    assert torch.get_rng_state().equal(state)  # attacks draw from it


@pytest.mark.skipif(not FORKS, reason="here processes are not forked")
def test_workers_are_there_for_a_policy_and_as_long_as_its_batches() -> None:
    def workers(epoch: int | None, **options: Any) -> int:
        batches = in_memory(2, **options).batches(torch.arange(60).split(7), CPU, epoch)
        next(batches)
        found = len(multiprocessing.active_children())
        batches.close()  # in the middle
        return found

    before = len(multiprocessing.active_children())
    assert workers(1, policy="rand") == before + 2
    assert workers(1, augment="crop_flip", cutout=2) == before
    assert workers(None, policy="rand") == before
    assert len(multiprocessing.active_children()) == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_a_worker_is_the_error(tmp_path: Path, num_workers: int) -> None:
    path = write(tmp_path, **arrays(2000))
    settings = DataSettings(
        path=str(pair(tmp_path / "labeled")),
        unlabeled={"path": str(path)},
        policy="rand",
        num_workers=num_workers,
    )
    images = load_data(settings).unlabeled
    assert images is not None
    batches = images.batches(torch.arange(2000).split(10), CPU, 1)
    next(batches)
    os.truncate(path, 10_000)
    with pytest.raises(ValueError, match=r"^path: \S+ has been cut short .* is wanted$"):
        list(batches)


def test_a_run_is_stopped_and_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    chosen = ["data.policy=rand", "data.train_size=160", "data.validation_size=0"]
    chosen += ["train.epochs=2", "train.batch_size=16", "train.log_every=1", "attack.num_steps=1"]
    chosen += ["attack.step_size=0.2", "train.select=last"]
    chosen += [f"evaluate.{name}=null" for name in ("pgd", "autoattack", "train_images")]

    def recipe(name: str, num_workers: int) -> Any:
        more = [f"output={tmp_path / name}", f"data.num_workers={num_workers}"]
        return load_recipe("quickstart", [*chosen, *more])

    def ask() -> None:
        while not RunFolder(tmp_path / "stopped").read_metrics():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    train(recipe("whole", 0))
    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(Stopped):
        train(recipe("stopped", 2))
    train(recipe("stopped", 1), resume=True)
    whole, stopped = (weights(tmp_path / name) for name in ("whole", "stopped"))
    assert all(whole[key].equal(stopped[key]) for key in whole | stopped)
    assert multiprocessing.active_children() == []
