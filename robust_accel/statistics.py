"""Intervals: of means over seeds, as few runs allow them, and of shares of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy.special import ndtri, stdtrit

_Z = float(ndtri(0.975))


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


def wilson_interval(share: float, number: int) -> tuple[float, float]:
    """95% interval of a share of independent images (Wilson 1927), to the nearest whole image."""
    # by hand: scipy.stats costs each process more than a second to import
    found = round(share * number)
    centre, half = found + _Z**2 / 2, _Z * sqrt(found * (1 - found / number) + _Z**2 / 4)
    low, high = (x / (number + _Z**2) for x in (centre - half, centre + half))
    return (low if found > 0 else 0.0), (high if found < number else 1.0)
