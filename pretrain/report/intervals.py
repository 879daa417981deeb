"""Means over seeds with their intervals, and differences between the same seeds of two methods.

All intervals are Student's t at 95 %: mean +- t(0.975, n - 1) s / sqrt(n), s the standard deviation with n - 1.
They take the seeds for a sample of all seeds, with values that scatter about normally.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of ``count`` values; ``low`` and ``high`` are None where there are too few for an interval."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and t interval; no interval below two values or where one is not finite.

    Raises:
        ValueError: no value was given.
    """
    if not values:
        raise ValueError("the mean of no values")
    numbers = np.asarray(values, dtype=np.float64)
    mean, count = float(numbers.mean()), len(numbers)
    if count < 2 or not np.isfinite(numbers).all():
        return Interval(mean, None, None, count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * numbers.std(ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half, count)


def paired_difference(values: Sequence[float], bases: Sequence[float]) -> Interval:
    """Mean of ``value - base`` of pairs, with its t interval."""
    return t_interval([value - base for value, base in zip(values, bases, strict=True)])


def paired_percent(values: Sequence[float], bases: Sequence[float]) -> Interval:
    """By how many percent values lie above their bases: mean and t interval of ``log(value / base)``, then exp.

    Raises:
        ValueError: a value or base is not positive.
    """
    logs = t_interval([math.log(value / base) for value, base in zip(values, bases, strict=True)])

    low, high = (None if end is None else _percent(end) for end in (logs.low, logs.high))
    return Interval(_percent(logs.mean), low, high, logs.count)


def _percent(log: float) -> float:
    """Infinite where it overflows, as it does with one seed that diverged."""
    try:
        return 100 * math.expm1(log)
    except OverflowError:
        return math.inf
