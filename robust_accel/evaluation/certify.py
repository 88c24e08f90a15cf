"""Certified L2 radii of smoothed classifiers, from a fixed or from as few samples as decide them.

The smoothed classifier predicts the class that the base classifier predicts most often under
Gaussian noise of standard deviation sigma. Where that class has probability p > 1/2, no
perturbation of L2 norm below sigma Phi^-1(p) changes the prediction (Cohen et al. 2019, arXiv
1902.02918, Theorem 1). p is estimated from samples; a certificate is wrong with probability at most
alpha.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, betaincinv, betaln, logsumexp, ndtr, ndtri
from torch import Tensor

from robust_accel.evaluation.outcomes import without_tf32
from robust_accel.models import PixelClassifier
from robust_accel.objectives import NOT_A_NUMBER, predicted

ABSTAIN = -1
Floats = NDArray[np.float64]
_BETAS = ((0.5, 0.5), (0.5, 0.05))


@overload
def certified_radius(count: int, n: int, *, alpha: float, sigma: float) -> float: ...
@overload
def certified_radius(count: ArrayLike, n: int, *, alpha: float, sigma: float) -> Any: ...
def certified_radius(count: ArrayLike, n: int, *, alpha: float, sigma: float) -> Any:
    """Radius that holds with probability 1 - alpha, if `count` of n samples are the class.

    Args:
        count: Integers in [0, n], a scalar or an array.
        n: Samples, >= 1.
        alpha: In (0, 1).
        sigma: Standard deviation of the noise in pixel units, > 0.

    Returns:
        Radii in pixel units, a float or an array; 0 where nothing is certified.

    Raises:
        ValueError: An argument is out of its range.

    Source: Cohen et al. 2019, Certify, with the lower Clopper-Pearson bound of p.
    """
    _check(n=n, alpha=alpha, sigma=sigma)
    counts = np.asarray(count)
    if ((counts < 0) | (counts > n)).any():
        raise ValueError(f"count must lie in [0, n = {n}], got {counts.min()} to {counts.max()}")
    radius = radius_of(lower_bound(counts, n, alpha), sigma)
    return radius if radius.ndim else float(radius)


def lower_bound(count: ArrayLike, n: int, alpha: float) -> Floats:
    """Clopper-Pearson: p is below this with probability at most alpha."""
    counts = np.asarray(count, dtype=np.float64)
    bound = betaincinv(np.maximum(counts, 1), n - counts + 1, alpha)
    return np.where(counts > 0, bound, 0.0)


def radius_of(p: ArrayLike, sigma: float) -> Floats:
    """sigma Phi^-1(p), or 0 where p is not above 1/2."""
    p = np.asarray(p, dtype=np.float64)
    return np.where(p > 0.5, sigma * ndtri(np.maximum(p, 0.5)), 0.0)


def _check(*, n: int, alpha: float, sigma: float, n0: int = 1) -> None:
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0, got {sigma}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    if not n >= n0 >= 1:
        raise ValueError(f"n must be at least n0 >= 1, got n = {n}, n0 = {n0}")


def log_wealth(p: ArrayLike, successes: ArrayLike, failures: ArrayLike) -> Floats:
    """log M(p), what betting against p has won; by broadcasting.

    For S successes and F failures and a mixture Pi of Beta distributions, let

        M(p) = integral of q^S (1 - q)^F dPi(q) / (p^S (1 - p)^F),

    the wealth of a gambler who bets against p with the mixture's forecasts. At the true p it is a
    nonnegative martingale that starts at 1: given q, a sample x multiplies the integrand by
    (q / p)^x ((1 - q) / (1 - p))^(1 - x), whose mean under p is q + (1 - q) = 1. By Ville's
    inequality M(p) ever reaches 1 / alpha with probability at most alpha. So the set where
    M(p) < 1 / alpha holds the true p at all times with probability 1 - alpha, at whatever time
    sampling is stopped. log M is convex in p with its minimum at S / (S + F): the set is an
    interval, and p0 below it with M(p0) >= 1 / alpha is a lower bound.

    The mixture puts half of its weight near 1, where most certified images are.

    Source: Ville 1939; Robbins 1970; the betting view of Waudby-Smith and Ramdas 2023 (arXiv
    2010.09686).
    """
    s, f, p = (np.asarray(v, dtype=np.float64) for v in (successes, failures, p))
    evidence = logsumexp(
        [betaln(a + s, b + f) - betaln(a, b) - np.log(len(_BETAS)) for a, b in _BETAS], axis=0
    )
    # 0 log 0 = 0: a bound of 0 or 1 is refuted only by what it forbids
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = np.where(s > 0, s * np.log(p), 0) + np.where(f > 0, f * np.log1p(-p), 0)
    return np.asarray(evidence - likelihood)


def is_refuted(
    p: ArrayLike, successes: ArrayLike, failures: ArrayLike, alpha: float
) -> NDArray[np.bool_]:
    """Whether p is not the true probability, at error alpha over all sample sizes at once."""
    return log_wealth(p, successes, failures) >= -np.log(alpha)


def lower_bound_at_any_time(successes: ArrayLike, failures: ArrayLike, alpha: float) -> Floats:
    """The least p that is not refuted, by bisection: never above it."""
    s, f = (np.asarray(v, dtype=np.float64) for v in (successes, failures))
    low, high = np.zeros_like(s), s / np.maximum(s + f, 1)
    for _ in range(40):  # to 1e-12
        middle = 0.5 * (low + high)
        above = is_refuted(middle, s, f, alpha)
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return low


@dataclass(frozen=True)
class Sequential:
    """When to stop sampling: as soon as every radius asked for is certified, or is out of reach.

    Certificates come from two bounds, each wrong with probability at most alpha / 2: the betting
    sequence, at any time, and one Clopper-Pearson bound at the cap of n samples. Together they are
    wrong with probability at most alpha, as Cohen's one. A radius is given up when the sequence's
    upper end is below it, or when even successes alone could not reach it at the cap: giving up
    certifies nothing, so it cannot harm.

    Args:
        radii: In pixel units, each >= 0.
        n: The cap.
        alpha: In (0, 1).
        sigma: > 0.
    """

    radii: tuple[float, ...]
    n: int
    alpha: float
    sigma: float

    @property
    def share(self) -> float:
        """Of alpha, that each of the two bounds has."""
        return self.alpha / 2

    @cached_property
    def thresholds(self) -> Floats:
        """The probability that certifies each radius."""
        return ndtr(np.asarray(self.radii) / self.sigma)

    @cached_property
    def needed(self) -> NDArray[np.int64]:
        """Successes at the cap that certify each radius; n + 1 where none do."""
        counts = np.arange(self.n // 2, self.n + 1)
        bounds = lower_bound(counts, self.n, self.share)
        return counts[0] + np.searchsorted(bounds, self.thresholds)

    def decided(self, successes: ArrayLike, samples: ArrayLike) -> NDArray[np.bool_]:
        """Whether nothing more is to be learned: counts [...] -> [...]."""
        s, t = (np.asarray(v)[..., None] for v in (successes, samples))
        known = is_refuted(self.thresholds, s, t - s, self.share)  # that p is above, or below
        out_of_reach = s + self.n - t < self.needed
        return np.asarray((known | out_of_reach).all(axis=-1))

    def bound(self, successes: ArrayLike, samples: ArrayLike) -> Floats:
        """Lower bound of p where sampling stopped: counts [...] -> [...]."""
        s, t = np.asarray(successes), np.asarray(samples)
        early = lower_bound_at_any_time(s, t - s, self.share)
        late = lower_bound(np.minimum(s, self.n), self.n, self.share)
        return np.where(t == self.n, np.maximum(early, late), early)


@dataclass(frozen=True)
class Certificate:
    """Of one image: the class (-1 abstains), the radius in pixel units, and the samples spent."""

    predict: int
    radius: float
    samples: int


class SmoothedClassifier:
    """A classifier under Gaussian noise.

    Args:
        classifier: Pixels in [0, 1] to logits, in eval mode. Noisy pixels are not clamped.
        sigma: Standard deviation of the noise in pixel units, > 0.
        batch_size: Noisy copies that go through the model at a time.
        bf16: Run the model in bf16; every prediction is then one in bf16.
    """

    def __init__(
        self, classifier: PixelClassifier, sigma: float, batch_size: int, *, bf16: bool = False
    ) -> None:
        _check(n=1, alpha=0.5, sigma=sigma)
        self.classifier, self.sigma, self.batch_size = classifier, sigma, batch_size
        self._dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    @without_tf32()
    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Predictions of n noisy copies. x: [C, H, W] on the generator's device -> counts [K].

        Logits that are not finite vote for no class.
        """
        counts: Tensor | None = None
        for size in _parts(n, self.batch_size):
            noise = torch.empty(size, *x.shape, device=x.device).normal_(generator=generator)
            with torch.autocast(x.device.type, self._dtype, enabled=self._dtype != torch.float32):
                logits = self.classifier(noise.mul_(self.sigma).add_(x))
            votes = predicted(logits)
            found = torch.bincount(votes[votes != NOT_A_NUMBER], minlength=logits.shape[1])
            counts = found if counts is None else counts + found
        assert counts is not None
        return counts

    def certify(
        self, x: Tensor, n0: int, n: int, alpha: float, generator: torch.Generator
    ) -> Certificate:
        """Cohen's Certify: guess the class by n0 samples, bound its probability by n others.

        x: [C, H, W] in [0, 1].
        """
        _check(n=n, n0=n0, alpha=alpha, sigma=self.sigma)
        guess = int(self.sample(x, n0, generator).argmax())
        count = int(self.sample(x, n, generator)[guess])
        return self._certificate(guess, float(lower_bound(count, n, alpha)), n0 + n)

    def certify_sequentially(
        self, x: Tensor, n0: int, rule: Sequential, generator: torch.Generator
    ) -> Certificate:
        """The same guarantee from as few samples as decide the rule's radii."""
        _check(n=rule.n, n0=n0, alpha=rule.alpha, sigma=self.sigma)
        guess = int(self.sample(x, n0, generator).argmax())
        successes = samples = 0
        for size in looks(rule.n, self.batch_size):
            successes += int(self.sample(x, size, generator)[guess])
            samples += size
            if bool(rule.decided(successes, samples)):
                break
        return self._certificate(guess, float(rule.bound(successes, samples)), n0 + samples)

    def predict(self, x: Tensor, n: int, alpha: float, generator: torch.Generator) -> int:
        """Cohen's Predict: the smoothed class, wrong with probability at most alpha, or -1."""
        _check(n=n, alpha=alpha, sigma=self.sigma)
        counts, classes = self.sample(x, n, generator).topk(2)
        first, second = counts.tolist()
        p_value = 2 * bdtr(second, first + second, 0.5)  # two-sided: were both as likely
        return int(classes[0]) if p_value <= alpha else ABSTAIN

    def _certificate(self, guess: int, p: float, samples: int) -> Certificate:
        radius = float(radius_of(p, self.sigma))
        return Certificate(guess if radius > 0 else ABSTAIN, radius, samples)


def looks(n: int, batch_size: int) -> Iterator[int]:
    """How many samples to take before each look: few at first, an eighth more each time."""
    taken = 0
    while taken < n:
        size = min(max(32, taken // 8), batch_size, n - taken)
        taken += size
        yield size


def _parts(n: int, size: int) -> Iterator[int]:
    for start in range(0, n, size):
        yield min(size, n - start)


def certified_accuracy(
    radii: Sequence[float], correct: ArrayLike, radius: ArrayLike
) -> list[float]:
    """Share of images that are right and certified at least to each radius."""
    right, own = np.asarray(correct, dtype=bool), np.asarray(radius)
    return [float((right & (own >= r)).mean()) for r in radii]
