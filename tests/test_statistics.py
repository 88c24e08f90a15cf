"""Intervals against the textbook."""

import pytest
from scipy.stats import binomtest

from robust_accel.statistics import paired_difference, t_interval, wilson_interval


def test_paired_difference_is_the_textbook_t_interval() -> None:
    # differences 1, 2, 3, 4, 5: mean 3, standard error sqrt(2.5 / 5), t(0.975, 4) = 2.776445
    result = paired_difference([11, 22, 33, 44, 55], [10, 20, 30, 40, 50])
    assert result == t_interval([1, 2, 3, 4, 5])
    assert result.mean == pytest.approx(3)
    assert result.low == pytest.approx(3 - 2.776445 * 0.5**0.5, abs=1e-5)
    assert result.high == pytest.approx(3 + 2.776445 * 0.5**0.5, abs=1e-5)
    with pytest.raises(ValueError, match="at least 2 values"):
        paired_difference([1.0], [1.0])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        paired_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize("number", [1, 7, 360, 10_000])
def test_the_interval_of_a_share_is_scipys_wilson_interval(number: int) -> None:
    for right in {0, 1, number // 3, number - 1, number}:
        expected = binomtest(right, number).proportion_ci(method="wilson")
        assert wilson_interval(right / number, number) == pytest.approx(expected, abs=1e-15)
