"""Gradients to quantise, their way there and back, and the levels that they may come back on."""

import torch

from robust_accel.comm.draws import random_key
from robust_accel.comm.layout import Segment

CPU = torch.device("cpu")
ALL_BITS = [16, 8, 4, 2]
BOTH_NORMS = ["max", "l2"]


def key(step=0, rank=0, seed=0):
    return random_key(seed, rank, step, CPU)


def one_segment(size):
    return [Segment(size, 0, False)]


def roundtrip(quantizer, x, segments=None, k=None):
    segments = segments or one_segment(x.numel())
    message = quantizer.encode(x, segments, key() if k is None else k)
    assert message.dtype == torch.uint8
    assert message.numel() == quantizer.num_bytes(segments)
    return quantizer.decode(message, segments)


def levels(bits, norm):
    return 2**bits if norm == "l2" else 2 ** (bits - 1) - 1


def block_norms(x, norm, block):
    """[d] float64: the norm of each element's block, computed apart from the package."""
    out = torch.empty_like(x, dtype=torch.float64)
    for i in range(0, x.numel(), block):
        b = x[i : i + block].double()
        out[i : i + block] = b.abs().max() if norm == "max" else b.square().sum().sqrt()
    return out


def sample(name, d):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(d, generator=g)
    if name == "heavy":
        x = x / torch.randn(d, generator=g)  # Cauchy
    elif name == "spikes":  # one entry takes nearly all of its block's norm, either sign
        x *= 0.02
        x[5::128] = 1.0
        x[5::256] = -1.0
    return x
