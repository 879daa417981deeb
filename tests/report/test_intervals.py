"""Student's t over seeds against numbers from tables and books."""

from __future__ import annotations

import math

import pytest

from pretrain.report.intervals import paired_difference, paired_percent, t_interval

# Student 1908, "The probable error of a mean", table of additional hours of sleep of ten patients under two drugs: the
# differences of the drugs, as every textbook has them: mean 1.58, t = 4.0621, 95 % interval [0.7001, 2.4599].
DRUG_1 = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
DRUG_2 = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def test_students_sleep_data() -> None:
    found = paired_difference(DRUG_2, DRUG_1)
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858))
    assert found.count == 10
    assert found.excludes_zero
    unpaired = t_interval(DRUG_1)  # 0.75 +- 2.262157 * 1.789010 / sqrt(10)
    assert (unpaired.low, unpaired.high) == pytest.approx((-0.5297804, 2.0297804))
    assert not unpaired.excludes_zero


@pytest.mark.parametrize(("count", "quantile"), [(2, 12.7062), (3, 4.30265), (5, 2.77645), (10, 2.26216)])
def test_the_quantile_of_few_seeds(count: int, quantile: float) -> None:
    values = [float(value) for value in range(count)]
    found = t_interval(values)
    mean = (count - 1) / 2
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    assert found.high is not None
    assert found.high - found.mean == pytest.approx(quantile * deviation / math.sqrt(count), rel=1e-5)


def test_percent_by_the_logarithm_of_ratios() -> None:
    found = paired_percent([60.0, 120.0], [100.0, 200.0])
    assert (found.mean, found.low, found.high) == pytest.approx((-40.0, -40.0, -40.0))
    found = paired_percent([2.0, 8.0], [1.0, 1.0])  # logs of 2 and 8: mean log 4, deviation log 4 / sqrt 2
    assert found.mean == pytest.approx(300.0)
    assert found.high == pytest.approx(100 * (4 * math.exp(12.7062047 * math.log(2)) - 1), rel=1e-6)
    swapped = paired_percent([1.0, 1.0], [2.0, 8.0])  # the same statement the other way round
    assert (1 + found.mean / 100) * (1 + swapped.mean / 100) == pytest.approx(1)
    assert found.low is not None and swapped.high is not None
    assert (1 + found.low / 100) * (1 + swapped.high / 100) == pytest.approx(1)


def test_a_seed_that_diverged_leaves_an_interval_without_an_end() -> None:
    """With two seeds the quantile is 12.7: a perplexity of 1e60 is enough."""
    found = paired_percent([1e60, 100.0], [100.0, 100.0])
    assert found.mean == pytest.approx(1e31) and found.low == pytest.approx(-100) and found.high == math.inf
    assert not found.excludes_zero


def test_no_interval_of_one_value_or_of_infinity() -> None:
    assert (t_interval([3.0]).low, t_interval([3.0]).high) == (None, None)
    assert not t_interval([3.0]).excludes_zero
    assert t_interval([3.0, math.inf]).low is None
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


def test_an_end_at_zero_excludes_nothing() -> None:
    assert not t_interval([0.0, 0.0, 0.0]).excludes_zero
    assert t_interval([2.0, 2.0, 2.0]).excludes_zero
