"""Protocols, a model of many buckets, its training in DDP, and the mean that must come out."""

import random
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from robust_accel.comm import QSGD, AllReduce, Meter

BITS = [16, 8, 4, 2]
PROTOCOLS = {
    "fp32": AllReduce(),
    "fp16": AllReduce(dtype="fp16"),
    "bf16": AllReduce(dtype="bf16"),
    **{f"{b}bit-{s}side": QSGD(bits=b, sides=s) for b in BITS for s in (1, 2)},
    "paper-1side": QSGD(bits=8, sides=1, norm="l2", block_size=None),
    "paper-2side": QSGD(bits=8, sides=2, norm="l2", block_size=None),
}
WIDTH, DEPTH = 24, 12


class Recorder:
    """Passes on to a protocol and keeps each call's gradient, segments and mean."""

    def __init__(self, inner):
        self.inner = inner
        self.calls = []

    def exchanges(self, flat, segments, step, workers, meter):
        return [self.recorded(flat, segments, step, workers, meter)]

    def recorded(self, flat, segments, step, workers, meter):
        before, own = flat.clone(), Meter()
        for exchange in self.inner.exchanges(flat, segments, step, workers, own):
            yield from exchange
        meter.sent(own.bytes_sent - own.bytes_inside_machine)
        meter.sent(own.bytes_inside_machine, inside_machine=True)
        self.calls.append(
            {
                "in": before,
                "segments": list(segments),
                "out": flat.clone(),
                "step": step,
                "bytes": own.bytes_sent,
            }
        )


def make_model(bias=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, WIDTH)]
    for _ in range(DEPTH):
        layers += [nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=bias)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def wrap(model, **kwargs):
    return DDP(model, bucket_cap_mb=0.002, **kwargs)  # about one layer a bucket


def batch(rank, step):
    g = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(4, 3, 6, 6, generator=g)


def params(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def train(model, steps, rank, delay=False):
    rng = random.Random(rank)
    for step in steps:
        if delay and rank == 1:  # a straggler between and inside backward passes
            time.sleep(rng.random() * 0.02)
        model.zero_grad()
        out = model(batch(rank, step))
        if delay and rank == 1:
            out.register_hook(lambda g: time.sleep(rng.random() * 0.02))
        out.square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad


def get(ranks, scenario):
    for r, result in enumerate(ranks):
        assert scenario.__name__ in result, f"rank {r}: {result.get('error')}"
    return [result[scenario.__name__] for result in ranks]


def check_mean(name, segments, inputs, outputs):
    """Outputs agree bit for bit and lie within the rounding of the exact mean."""
    assert all(torch.equal(outputs[0], out) for out in outputs[1:])
    exact = torch.stack([x.double() for x in inputs]).mean(0)
    sizes = [s.size for s in segments]
    columns = zip(
        segments, exact.split(sizes), outputs[0].split(sizes), *(x.split(sizes) for x in inputs),
        strict=True,
    )  # fmt: skip
    for s, mean, out, *own in columns:
        if s.size:
            # a tensor's norm bounds its blocks' norms; the second side rounds a mean of roundings
            norm = 2 if "paper" in name else float("inf")
            largest = sum(float(torch.linalg.vector_norm(x, norm)) for x in own) / len(own)
            if s.raw and "bit" in name:
                step = 0.0
            elif "paper" in name:
                step = 1 / 256
            elif "bit" in name:
                step = 1 / (2 ** (int(name.split("bit")[0]) - 1) - 1)
            else:
                step = {"fp32": 0.0, "fp16": 2**-10, "bf16": 2**-7}[name]
            sides = 1 if "1side" in name else 2
            tolerance = largest * (step * (sides + step) + 1e-6)
            tolerance += 2**-23 if name == "fp16" else 0  # its smallest numbers
            assert (out - mean).abs().max() <= tolerance, (name, s)
