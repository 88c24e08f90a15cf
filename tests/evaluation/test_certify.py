"""Certificates against closed forms, published logs, and simulated errors."""

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from robust_accel.evaluation.certify import (
    ABSTAIN,
    Sequential,
    SmoothedClassifier,
    certified_accuracy,
    certified_radius,
    is_refuted,
    log_wealth,
    looks,
    lower_bound,
    lower_bound_at_any_time,
)
from robust_accel.models import PixelClassifier

LOGS = (
    Path(__file__).parent.parent.parent
    / os.environ.get("ROBUST_ACCEL_DATA", "../shared/data")
    / "certify-logs"
)


# ---- Cohen's procedure -------------------------------------------------------------------------


def test_radius_is_sigma_times_the_quantile_of_clopper_pearson() -> None:
    # all of n: the bound is alpha^(1/n)
    radius = certified_radius(100_000, 100_000, alpha=0.001, sigma=0.5)
    assert isinstance(radius, float)
    assert radius == pytest.approx(0.5 * stats.norm.ppf(0.001 ** (1 / 100_000)), rel=1e-9)
    assert f"{radius:.4f}" == "1.9057"  # the largest radius of published logs
    # the binomial tail at the bound is alpha
    bound = float(lower_bound(80, 100, 0.01))
    assert stats.binom.sf(79, 100, bound) == pytest.approx(0.01, rel=1e-6)
    found = certified_radius(np.array([0, 50, 80]), 100, alpha=0.01, sigma=2.0)
    assert found.tolist() == [0, 0, pytest.approx(2 * stats.norm.ppf(bound))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 1.0}, "alpha"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": -1.0}, "sigma"),
        ({"n": 0}, "n must be"),
        ({"count": 11}, "count must lie"),
        ({"count": -1}, "count must lie"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments: dict, message: str) -> None:
    given = {"count": 5, "n": 10, "alpha": 0.1, "sigma": 0.5} | arguments
    with pytest.raises(ValueError, match=message):
        certified_radius(given.pop("count"), given.pop("n"), **given)


@pytest.mark.skipif(not LOGS.exists(), reason=f"no certification logs at {LOGS}")
@pytest.mark.parametrize(
    ("log", "sigma"),
    [
        ("cohen_cifar10_sigma0.12", 0.12),
        ("smoothadv_cifar10_sigma0.12_m4", 0.12),
        ("smoothadv_cifar10_sigma0.25_m8", 0.25),
        ("smoothadv_cifar10_sigma0.50_m2", 0.5),
        ("smoothadv_cifar10_sigma1.00_m4", 1.0),
    ],
)
def test_published_radii_are_radii_of_counts(log: str, sigma: float) -> None:
    """Every row, to the digits printed."""
    with (LOGS / f"{log}.tsv").open() as file:
        printed = np.array([float(r["radius"]) for r in csv.DictReader(file, delimiter="\t")])
    assert len(printed) in (500, 10_000)
    radii = certified_radius(np.arange(50_000, 100_001), 100_000, alpha=0.001, sigma=sigma)
    possible = {f"{radius:.3}" for radius in radii}
    assert {f"{radius:.3}" for radius in printed if radius > 0} <= possible
    assert printed.max() == float(f"{radii[-1]:.3}")


# ---- the betting sequence ----------------------------------------------------------------------


def test_wealth_is_a_martingale_at_the_true_p() -> None:
    """Its mean after t samples is 1, summed over all outcomes."""
    for p in (0.3, 0.9, 0.999):
        for t in (1, 7, 60):
            successes = np.arange(t + 1)
            wealth = np.exp(log_wealth(p, successes, t - successes))
            assert (stats.binom.pmf(successes, t, p) * wealth).sum() == pytest.approx(1, rel=1e-9)


def test_bounds_enclose_the_mean_and_agree_with_the_tests() -> None:
    s, f = np.array([0, 50, 95, 1000]), np.array([10, 50, 5, 0])
    low = lower_bound_at_any_time(s, f, 0.01)
    assert (low <= s / (s + f)).all()
    assert low[0] == 0 and low[3] > 0.98
    assert is_refuted(low[1:] - 1e-9, s[1:], f[1:], 0.01).all()
    assert not is_refuted(low[1:] + 1e-6, s[1:], f[1:], 0.01).any()
    # mirrored samples are mirrored evidence only under a mirrored mixture: both ends are checked
    assert is_refuted(0.3, 5, 95, 0.01) and not is_refuted(0.06, 5, 95, 0.01)
    # better than nothing, worse than a bound for one fixed sample size
    assert low[2] < lower_bound(95, 100, 0.01)


@pytest.mark.parametrize("radius", [0.1, 0.4])
def test_error_at_the_boundary_stays_below_alpha(radius: float) -> None:
    """50,000 images whose true radius is just below what is asked: none may be certified."""
    sigma, alpha, trials, n = 0.25, 0.05, 50_000, 2000
    rule = Sequential((radius,), n, alpha, sigma)
    (p,) = rule.thresholds
    rng = np.random.default_rng(0)
    won, taken = np.zeros(trials, dtype=np.int64), np.zeros(trials, dtype=np.int64)
    active = np.arange(trials)
    for size in looks(n, 200):
        won[active] += rng.binomial(size, p, len(active))
        taken[active] += size
        active = active[~rule.decided(won[active], taken[active])]
    wrong = (rule.bound(won, taken) > p).mean()
    assert 0.001 < wrong < alpha  # neither vacuous nor broken


def test_sampling_stops_when_radii_are_decided_or_out_of_reach() -> None:
    rule = Sequential((0.25,), 10_000, 0.001, 0.25)  # p = 0.841
    assert not rule.decided(0, 0)
    assert rule.decided(300, 300) and rule.bound(300, 300) > 0.841
    assert rule.decided(100, 300)  # half: far below
    # close to the boundary it goes on, to the cap
    assert not rule.decided(4206, 5000)
    assert rule.decided(8413, 9999)  # by one more it cannot be reached
    assert rule.decided(8500, 10_000)
    assert rule.bound(8600, 10_000) == pytest.approx(float(lower_bound(8600, 10_000, 0.0005)))
    # out of reach: even successes alone do not suffice at the cap
    tight = Sequential((0.9,), 1000, 0.001, 0.25)
    assert tight.needed[0] == 1001 and tight.decided(0, 0)
    assert sum(looks(100_000, 1000)) == 100_000
    assert max(looks(100_000, 1000)) == 1000


# ---- a smoothed model --------------------------------------------------------------------------

SIGMA = 0.25


@pytest.fixture
def linear() -> tuple[SmoothedClassifier, Tensor, float]:
    """Two classes and a linear border: the true radius is the distance to it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    weight = torch.linspace(-1, 1, 12)
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-weight, weight]))
        model[1].bias.zero_()
    x = torch.full((3, 2, 2), 0.5)
    distance = 0.3
    x = x + distance * (weight / weight.norm()).view(3, 2, 2)
    model[1].bias.data[0] = 2 * 0.5 * weight.sum()  # the border goes through grey
    classifier = SmoothedClassifier(PixelClassifier(model), SIGMA, batch_size=500)
    return classifier, x, distance


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_certified_radii_approach_the_true_one_from_below(linear) -> None:
    smoothed, x, distance = linear
    rule = Sequential((0.2, 0.25), 5000, 0.001, SIGMA)
    for seed in range(5):
        cohen = smoothed.certify(x, 100, 5000, 0.001, generator(seed))
        assert cohen.predict == 1 and cohen.samples == 5100
        assert 0.25 < cohen.radius <= distance
        sequential = smoothed.certify_sequentially(x, 100, rule, generator(seed))
        assert sequential.predict == 1
        assert 0.2 <= sequential.radius <= distance
        assert sequential.samples < 5100
    # counts follow the normal distribution of the distance
    share = smoothed.sample(x, 20_000, generator(9))[1].item() / 20_000
    assert share == pytest.approx(stats.norm.cdf(distance / SIGMA), abs=4 * math.sqrt(0.1 / 20_000))


def test_on_the_border_it_abstains(linear) -> None:
    smoothed, x, _ = linear
    x = torch.full_like(x, 0.5)
    assert smoothed.certify(x, 100, 1000, 0.001, generator(0)).predict == ABSTAIN
    assert smoothed.certify(x, 100, 1000, 0.001, generator(0)).radius == 0
    assert smoothed.predict(x, 1000, 0.001, generator(0)) == ABSTAIN
    rule = Sequential((0.1,), 1000, 0.001, SIGMA)
    assert smoothed.certify_sequentially(x, 100, rule, generator(0)).predict == ABSTAIN


def test_the_smoothed_prediction(linear) -> None:
    smoothed, x, _ = linear
    assert smoothed.predict(x, 200, 0.001, generator(0)) == 1
    assert smoothed.predict(1 - x, 200, 0.001, generator(0)) == 0


def test_samples_repeat_by_seed_and_not_by_batch_alone(linear) -> None:
    smoothed, x, _ = linear
    one, again, other = (smoothed.sample(x, 700, generator(s)).tolist() for s in (1, 1, 2))
    assert one == again != other
    assert sum(one) == 700


def test_n_below_n0_is_refused(linear) -> None:
    smoothed, x, _ = linear
    with pytest.raises(ValueError, match="n must be at least n0"):
        smoothed.certify(x, 100, 50, 0.001, generator(0))


def test_certified_accuracy_counts_right_images_by_radius() -> None:
    found = certified_accuracy([0.1, 0.2, 0.3], [1, 0, 1, 1], [0.2, 0.9, 0.1, 0.0])
    assert found == [0.5, 0.25, 0]
