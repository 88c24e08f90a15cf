"""Benchmarks start, and the smallest case runs; what they measure is not judged here."""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import processes
import pytest
import timm
import torch
from torch.nn.parallel import DistributedDataParallel

from robust_accel.evaluation import EvaluateSettings
from robust_accel.evaluation.any_module import TensorImages
from robust_accel.models import PixelClassifier
from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = sorted(path.name for path in FOLDER.glob("*.py") if path.name[0] != "_")


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FOLDER / name, *arguments], capture_output=True, text=True, timeout=120
    )


def load(name: str) -> ModuleType:
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # as for a script there
    spec = importlib.util.spec_from_file_location(f"benchmark_{Path(name).stem}", FOLDER / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_is_measured(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        load(name).main()
    assert f"python benchmarks/{name}" in capsys.readouterr().out


def has_namespaces() -> bool:
    """Root, the tools, and a kernel that lets us: containers often do not."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    ip = shutil.which("ip", path=path)
    if os.geteuid() != 0 or ip is None or shutil.which("tc", path=path) is None:
        return False
    name = f"robust-test-{os.getpid()}"
    if subprocess.run([ip, "netns", "add", name], capture_output=True).returncode:
        return False
    return subprocess.run([ip, "netns", "del", name], capture_output=True).returncode == 0


def namespaces() -> set[str]:
    folder = Path("/var/run/netns")
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.mark.long
def test_comm_counts_what_the_interface_sends_and_cleans_up() -> None:
    if not has_namespaces():
        pytest.skip("needs root, ip, tc and network namespaces")
    process = subprocess.Popen(
        [
            sys.executable, FOLDER / "comm.py", "--nodes", "2", "--rate", "none", "--repeats", "1",
            "--model", "wide_resnet10_1", "--protocols", "fp32", "8bit-2sided",
            "--what", "exchange,step",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    rows = [line.strip("| \n").split(" | ") for line in output.splitlines() if line[:1] == "|"]
    header, _, *rows = rows
    assert [row[0] for row in rows] == ["fp32", "8bit-2sided"], output  # neither fails
    assert all(float(row[header.index("step (s)")]) > 0 for row in rows)
    for row in rows:
        # a small model: gloo's own headers weigh more than with a real one
        assert float(row[header.index("wire / sent")]) == pytest.approx(1, abs=0.05)
    assert not [name for name in namespaces() if f"-{process.pid}-" in name]


def options_of_autoattack(folder: Path) -> argparse.Namespace:
    about = {"run": folder, "threads": 1, "images": 8, "version": "quick", "batch_size": 4}
    return argparse.Namespace(**about)


@pytest.mark.parametrize("number", [1, 2])
def test_autoattack_is_timed_on_the_cpu_where_there_is_a_gpu_too(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("autoattack.py")
    environments: list[dict[str, str]] = []

    def started(command: list[str], env: dict[str, str], **_: Any) -> None:
        environments.append(env)
        raise StopIteration

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(module.subprocess, "run", started)
    with pytest.raises(StopIteration):
        module.ours(options_of_autoattack(tmp_path), RunFolder(tmp_path / "out"), number, "fp32")
    assert environments[0]["ACCELERATE_USE_CPU"] == "true"


def test_autoattack_compares_only_what_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("autoattack.py")
    in_l1 = load_recipe("quickstart", ["evaluate.norm=l1", "evaluate.eps=3"])
    monkeypatch.setattr(module, "recipe_of", lambda *_, **__: in_l1)
    with pytest.raises(SystemExit, match=r"evaluate\.norm: l1 is not compared: linf and l2 are"):
        module.plain(options_of_autoattack(tmp_path))
    monkeypatch.setattr(sys, "argv", ["autoattack.py", "runs/x", "--version", "rand"])
    with pytest.raises(SystemExit, match="2"):
        module.main()
    assert "invalid choice: 'rand'" in capsys.readouterr().err


def staying(rank: int, world_size: int) -> tuple[int, int]:
    """As the benchmark counts it, and by what the profiler saw allocated and not freed.

    It does not see what gloo's own thread frees: so no weights and buckets that only pass through.
    """
    x = torch.rand(4, 512)
    passing_none = {"init_sync": False, "find_unused_parameters": True}
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        model = DistributedDataParallel(torch.nn.Linear(512, 512), **passing_none)
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    events = profile.profiler.kineto_results.events()
    allocated = sum(e.nbytes() for e in events if e.name() == "[memory]")
    return load("fsdp2.py").staying(model, optimizer), allocated


def test_fsdp2_counts_all_that_stays_between_two_steps(tmp_path: Path) -> None:
    for found in processes.run([staying], 2, tmp_path):
        assert "error" not in found, found["error"]
        counted, allocated = found["staying"]
        assert counted == pytest.approx(allocated, rel=0.01)


def agreement_case(module: ModuleType, norm: str, eps: float) -> Any:
    """An untrained network, and as labels what it predicts of noise, but for the first image.

    Double precision: two ways to write a sum must not flip the sign of a gradient.
    """
    network = timm.create_model("test_resnet", num_classes=10)
    classifier = PixelClassifier(network, mean=0.5, std=0.1).double().eval()
    classifier.requires_grad_(False)
    x = torch.rand(6, 3, 32, 32, dtype=torch.float64)
    labels = classifier(x).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 10
    settings = EvaluateSettings(norm=norm, eps=eps, autoattack="standard")
    return module.Case(
        classifier, TensorImages(x, labels), 10, settings, x, labels, torch.arange(6) > 0
    )


@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("l2", 1)])
def test_agreement_with_torchattacks(norm: str, eps: float) -> None:
    module = load("agreement.py")
    case = agreement_case(module, norm, eps)
    for attack in ("fgsm", "pgd"):
        row = module.compare(case, attack, "torchattacks", module.of_torchattacks)
        assert row[5:] == ["0", "5 of 5"], row
    assert module.ours(case, "clean", 0).robust.sum() == 5
    assert module.ours(case, "pgd", 0).robust.sum() < 5  # else nothing was compared


def test_agreement_counts_images_not_accuracies() -> None:
    module = load("agreement.py")
    case = agreement_case(module, "linf", 1 / 255)

    def wrong(case: Any, attack: str, seed: int) -> Any:  # as many survive, but two others
        return module.Found(module.ours(case, attack, seed).robust.flip(0))

    *_, ours, theirs, differ, same = module.compare(case, "clean", "wrong", wrong)
    assert (ours, theirs, differ, same) == ("5", "5", "2", "")


def test_agreement_says_which_peer_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("agreement.py")
    monkeypatch.setitem(module.PEERS, "nobody", ("no_such_module", "", module.of_foolbox))
    assert list(module.installed(["torchattacks", "nobody"])) == ["torchattacks"]
    assert "nobody: not installed, left out" in capsys.readouterr().out
