"""Random numbers for the rounding: a hash of (seed, worker, step, position), in tensor code.

The same on every device and rank, resumable from two integers, and cheap inside of a kernel.
"""

import torch
from torch import Tensor

_MASK32, _MASK64 = (1 << 32) - 1, (1 << 64) - 1


def random_key(seed: int, stream: int, step: int, device: torch.device) -> Tensor:
    """Two int32 words that select one sequence of draws. key: [2]."""
    word = 0
    for value in (seed, stream, step):
        word = _mix64((word + value) & _MASK64)
    # filled on the device: a copy from the host would wait for the stream
    words = (word & _MASK32, word >> 32)
    return torch.cat([torch.full((1,), _int32(w), dtype=torch.int32, device=device) for w in words])


def _mix64(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _int32(x: int) -> int:
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)


def _mix32(x: Tensor) -> Tensor:
    """One round of the 32-bit mixer `lowbias32`. x: int32, which wraps."""
    # `>>` keeps the sign, so the shifted-in bits are masked away
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    return x ^ ((x >> 15) & 0x1FFFF)


def row_seeds(position: Tensor, key: Tensor) -> Tensor:
    """Where each block's sequence of draws starts. position: [rows] int32, key: [2] int32."""
    x = _mix32(position + key[0]) + key[1]
    return _mix32(_mix32(x * _int32(0x846CA68B)))


def uniform_pair(seeds: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Draws in (0, 1) with 16 bits, two from a hash. seeds: [rows] -> two of [rows, size]."""
    column = torch.arange(size, dtype=torch.int32, device=seeds.device)
    weyl = column * _int32(0x9E3779B9) + _int32(start * 0x9E3779B9 & _MASK32)
    hashed = _mix32(seeds[:, None] + weyl)
    # in the middle of each interval: the mean is exactly 1/2
    low = ((hashed & 0xFFFF).to(torch.float32) + 0.5) * 2.0**-16
    high = (((hashed >> 16) & 0xFFFF).to(torch.float32) + 0.5) * 2.0**-16
    return low, high


def uniform(seeds: Tensor, size: int) -> Tensor:
    """Draws in (0, 1] with 32 bits, as fine as fp32 near 0. seeds: [rows] -> [rows, size]."""
    low, high = uniform_pair(seeds, 0, size)
    return (high - 2.0**-17) + low * 2.0**-16
