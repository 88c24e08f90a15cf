"""Every test runs on one thread and from one seed."""

import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from pictures import drawn

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # and in every process that a test starts
if "ROBUST_ACCEL_TEST_GPU" not in os.environ:  # make test-gpu
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# a worker has one server to fork from, and imports take longer than what is done in the forks
multiprocessing.set_forkserver_preload(
    [
        "robust_accel.training.run",
        "deepspeed.runtime.zero.muon.original_muon",
        "matplotlib.pyplot",
        "sklearn.datasets",
        "sklearn.model_selection",
        "torch.distributed.tensor.experimental",
        "transformers",
    ]
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes come first: at the end, one worker would wait for the other."""
    slow = {item.path for item in items if item.get_closest_marker("launch")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    """Accelerate keeps one state a process, precision included: each test starts without."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def datasets_in_tmp(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What datasets writes on the way goes to pytest's folder."""
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)


@pytest.fixture(scope="module")
def pictures() -> Iterator[None]:
    """Reports have their pictures."""
    with drawn():
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes a disk of so many bytes."""
    mounted = tmp_path / "disk"
    mounted.mkdir()

    def make(size: int, *options: str) -> Path:
        how = ",".join((f"size={size}", *options))
        command = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(mounted)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root may mount a small disk here")
        return mounted

    yield make
    subprocess.run(["umount", "--lazy", str(mounted)], capture_output=True)
