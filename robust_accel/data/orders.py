"""Shuffled orders and random draws of any number of images, in the memory of those asked for."""

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 8


class Order:
    """A shuffled order of N images, each place of it computed when it is asked for.

    ``order[places]`` are the images at these places, [B] of int64 in [0, N): each image is at one
    place. A list of 50 million images would be 400 MB in each process, shuffled anew each epoch.

    Args:
        length: N, at least 1.
        key: Of whole numbers >= 0; another key is another order.

    Source: a Feistel network on the numbers below a power of 2, walked until it is below N (Black
    and Rogaway 2002, "Ciphers with arbitrary finite domains"); the rounds mix by splitmix64.
    """

    def __init__(self, length: int, *key: int) -> None:
        self._length = np.uint64(length)
        bits = max((length - 1).bit_length(), 2)
        low, high = bits // 2, bits - bits // 2
        self._shift = np.uint64(low)
        self._low, self._high = np.uint64(2**low - 1), np.uint64(2**high - 1)
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __getitem__(self, places: Tensor) -> Tensor:
        found = self._permuted(places.numpy().astype(np.uint64))
        while (beyond := np.flatnonzero(found >= self._length)).size:
            found[beyond] = self._permuted(found[beyond])
        return torch.from_numpy(found.astype(np.int64))

    def _permuted(self, values: np.ndarray) -> np.ndarray:
        low, high = values & self._low, values >> self._shift
        for first, second in zip(self._keys[::2], self._keys[1::2], strict=True):
            high ^= _mixed(low + first) & self._high
            low ^= _mixed(high + second) & self._low
        return (high << self._shift) | low


def draws(indices: Tensor, *key: int) -> Tensor:
    """63 random bits an index, [B] of int64, which depend on the key and that index alone."""
    own = np.random.SeedSequence(key).generate_state(1, np.uint64)
    mixed = _mixed(_mixed(indices.numpy().astype(np.uint64)) + own)
    return torch.from_numpy((mixed >> np.uint64(1)).astype(np.int64))


def uniforms(indices: Tensor, number: int, *key: int) -> Tensor:
    """So many draws from [0, 1) an index, as of ``draws``: [B, number] of float64, whole 2^-32."""
    found = [draws(indices, *key, i) for i in range(1, number + 1)]  # a zero would say nothing
    return (torch.stack(found, dim=1) >> 31).double() / 2**32


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's step: 64 bits to 64 bits, one to one."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
