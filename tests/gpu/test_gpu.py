"""What is done on a GPU is what is done on a CPU: parts, then commands, each in its own process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robust_accel import EvaluateSettings, evaluate
from robust_accel.attacks import PGD
from robust_accel.comm.draws import random_key
from robust_accel.comm.kernels import BlockNorm, num_levels
from robust_accel.comm.layout import segment
from robust_accel.comm.quantizer import Quantizer
from robust_accel.evaluation.outcomes import without_tf32
from robust_accel.optim import LAMB

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU seen: make test-gpu")
SHAPES = [(64, 3, 3, 3), (64,), (128, 64, 3, 3), (10, 128), (10,)]


def random_tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("exclude_1d", [False, True])
def test_lamb_steps_as_on_a_cpu(exclude_1d: bool) -> None:
    results = []
    for device, form in (("cpu", False), ("cuda", None)):
        params = [nn.Parameter(t.to(device)) for t in random_tensors(0)]
        lamb = LAMB(params, lr=0.03, weight_decay=1e-4, exclude_1d=exclude_1d, foreach=form)
        for step in range(5):
            for param, grad in zip(params, random_tensors(step + 1), strict=True):
                param.grad = grad.to(device)
            lamb.step()
        results.append([param.detach().cpu() for param in params])
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
@pytest.mark.parametrize(("norm", "block"), [("max", 128), ("max", None), ("l2", None)])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_message_made_on_a_gpu_is_a_cpus_but_for_rounding(
    bits: int, compiled: bool, norm: BlockNorm, block: int | None
) -> None:
    flat = torch.cat([t.flatten() for t in random_tensors(0)])
    position, segments = 0, []
    for shape in SHAPES:
        segments.append(segment(torch.Size(shape), position))
        position += torch.Size(shape).numel()
    decoded = []
    for device in ("cpu", "cuda"):
        q = Quantizer(bits, norm, block, compile=compiled and device == "cuda")
        key = random_key(0, 0, 3, torch.device(device))
        message = q.encode(flat.to(device), segments, key)
        decoded.append(q.decode(message, segments).cpu())
    cpu, gpu = decoded
    size = flat.norm() if norm == "l2" else flat.abs().max()
    step = size / num_levels(bits, norm)
    assert (gpu - flat).abs().max() <= step * 1.001
    # where a draw falls on the line between two levels, the last bit of a division decides
    assert ((gpu - cpu).abs() > 1e-6).float().mean() < 1e-2
    assert (gpu - cpu).abs().max() <= step * 1.001


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_finds_on_a_gpu_what_it_finds_on_a_cpu(norm: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    x, y = torch.rand(64, 3, 8, 8), torch.arange(64) % 10
    eps = 0.1 if norm == "linf" else 0.5
    found = []
    for device in ("cpu", "cuda"):
        net, labels = model.to(device), y.to(device)

        def loss(z: Tensor, net: nn.Module = net, labels: Tensor = labels) -> Tensor:
            return cross_entropy(net(z), labels, reduction="none")

        attack = PGD(norm=norm, eps=eps, num_steps=5, random_start=False)
        found.append(attack(loss, x.to(device)).cpu())
    off = (found[0] - found[1]).abs().amax((1, 2, 3))
    # a sign that rounding decides moves a pixel by a step
    assert (off < 1e-3).float().mean() > 0.9


def test_images_on_a_gpu_are_measured_as_those_on_a_cpu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    x, y = torch.rand(64, 3, 8, 8), torch.arange(64) % 10
    settings = EvaluateSettings(eps=0.01, pgd={"num_steps": 5}, sanity={"images": 8})
    of_cpu, of_gpu = (evaluate(model, x.to(d), y.to(d), settings) for d in ("cpu", "cuda"))
    assert of_gpu.clean.accuracy == of_cpu.clean.accuracy
    assert of_gpu.pgd.accuracy == pytest.approx(of_cpu.pgd.accuracy, abs=0.05)


def test_a_verdicts_convolution_is_in_fp32() -> None:
    conv, x = nn.Conv2d(64, 64, 3), torch.randn(8, 64, 16, 16)
    exact = conv.double()(x.double()).float()
    with without_tf32():
        found = conv.float().cuda()(x.cuda()).cpu()
    torch.testing.assert_close(found, exact, rtol=0, atol=5e-5)  # TF32 is off by some 3e-4


def test_protocols_on_nccl() -> None:
    said = python(NCCL)
    assert "same on nccl" in said


NCCL = """
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, os.environ["TESTS_COMM"])
import ddp_training as d
from robust_accel.comm.ddp import DDPCompression
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
torch.cuda.set_device(0)
store = dist.HashStore()
dist.init_process_group("nccl", store=store, rank=0, world_size=1)
for name, protocol in d.PROTOCOLS.items():
    recorder = d.Recorder(protocol)
    model = d.wrap(d.make_model().cuda(), device_ids=[0])
    compression = DDPCompression(model, recorder, None)
    for step in range(3):
        model.zero_grad()
        model(d.batch(0, step).cuda()).square().mean().backward()
        torch.cuda.synchronize()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
    assert compression.steps == 3, compression.steps
    assert len(recorder.calls) > 3
    for call in recorder.calls:
        d.check_mean(name, call["segments"], [call["in"].cpu()], [call["out"].cpu()])
    sent = torch.cat([c["out"] for c in recorder.calls if c["step"] == 2]).abs().sum()
    own = sum(p.grad.abs().sum() for p in model.parameters())
    torch.testing.assert_close(sent, own, rtol=1e-4, atol=1e-4)  # what DDP gave is what was sent
    assert compression.meter.seconds > 0 and compression.meter.exposed_seconds > 0
    compression.close()
dist.destroy_process_group()
print("same on nccl")
"""


def python(code: str) -> str:
    """What a script prints; its arguments are this test's folders."""
    environment = os.environ | {"TESTS_COMM": str(Path(__file__).parents[1] / "comm")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def command(*words: object, launcher: tuple[str, ...] = (), **environment: str) -> str:
    launch = ["-m", "accelerate.commands.launch", *launcher] if launcher else []
    done = subprocess.run(
        [sys.executable, *launch, "-m", "robust_accel", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def accuracies(folder: Path) -> list[float]:
    return [100 * found["accuracy"] for found in report(folder)["measurements"]]


SHORT = ("train.epochs=6", "train.validate_every=2", "evaluate.autoattack_images=50")
ON_CPU = {"ACCELERATE_USE_CPU": "true"}
KINDS = {
    "fp32": ("train.precision=fp32",),
    "bf16": ("train.precision=bf16", "train.channels_last=true"),
    "fp16": ("train.precision=fp16",),
    "compiled": ("train.compile=true", "train.precision=bf16"),
    "trades": ("objective={name: trades, beta: 6}", "train.ema_decay=0.9"),
    "awp": ("train.awp={gamma: 0.005}",),
    "l2": ("attack={name: ddn, eps: 1.0, num_steps: 5}",),
}


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_what_it_does_on_a_cpu(kind: str, tmp_path: Path) -> None:
    settings = KINDS[kind]
    on_gpu = command("train", "quickstart", *SHORT, *settings, f"output={tmp_path / 'gpu'}")
    plain = [s for s in settings if not s.startswith(("train.compile", "train.precision"))]
    command("train", "quickstart", *SHORT, *plain, f"output={tmp_path / 'cpu'}", **ON_CPU)
    assert report(tmp_path / "gpu")["hardware"] == torch.cuda.get_device_name()
    gpu, cpu = accuracies(tmp_path / "gpu"), accuracies(tmp_path / "cpu")
    print(kind, gpu, cpu, on_gpu[-600:])
    assert len(gpu) == len(cpu) > 0
    assert all(abs(a - b) < 15 for a, b in zip(gpu, cpu, strict=True)), (gpu, cpu)


def test_a_run_is_measured_alike_on_both(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command("train", "quickstart", *SHORT, f"output={run}")
    found = []
    for environment in ({}, ON_CPU):
        command("evaluate", run, "evaluate.autoattack_images=100", **environment)
        found.append(accuracies(run))
    print(found)
    assert all(abs(a - b) <= 2 for a, b in zip(*found, strict=True)), found
    said = command("certify", run, "certify.sigma=0.1", "certify.n=1000", "certify.images=20")
    assert "radius" in said


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    settings = ("quickstart", *SHORT, "train.deterministic=true", "train.checkpoint_every=10")
    command("train", *settings, f"output={tmp_path / 'whole'}")
    cut = [sys.executable, "-m", "robust_accel", "train", *settings, f"output={tmp_path / 'cut'}"]
    process = subprocess.Popen(cut, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list((tmp_path / "cut").glob("checkpoints/*")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.kill()
    process.communicate()
    command("train", *settings, f"output={tmp_path / 'cut'}", "--resume")
    digests = [report(tmp_path / name)["parameters_digest"] for name in ("whole", "cut")]
    assert digests[0] == digests[1]
    assert accuracies(tmp_path / "whole") == accuracies(tmp_path / "cut")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_trains(stage: int, tmp_path: Path) -> None:
    launcher = ("--use_deepspeed", "--zero_stage", str(stage), "--num_processes", "1")
    launcher += ("--main_process_port", str(29600 + stage))
    settings = ("train.precision=bf16", f"output={tmp_path / 'run'}")
    command("train", "quickstart", *SHORT, *settings, launcher=launcher)
    found = accuracies(tmp_path / "run")
    print(stage, found)
    assert found[0] > 60
