"""Means over seeds, with the interval that a few runs allow."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy.special import stdtrit


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% t-interval."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of independent runs with the 95% t-interval of n - 1 degrees.

    Raises:
        ValueError: Fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a t-interval needs at least 2 values, got {len(values)}")
    mean = fmean(values)
    half = float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Of ``values - baseline``, pair by pair: runs that share a seed share its luck.

    Raises:
        ValueError: Fewer than two pairs, or lists of different length.
    """
    return t_interval([a - b for a, b in zip(values, baseline, strict=True)])
