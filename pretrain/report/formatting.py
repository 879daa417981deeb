"""Numbers as people read them, the same in tables, figures and the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable

TIMES, MINUS = "\u00d7", "\u2212"
ABSENT = "\u2013"


def compact(value: float) -> str:
    """About three digits and a suffix: 8.14, 98.2, 101.3, 1.24K, 29.2K, 4.10M."""
    if not math.isfinite(value):
        return str(value)
    for scale, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K"), (1.0, "")):
        scaled = value / scale
        if abs(scaled) >= 0.99995 or scale == 1:
            return f"{scaled:.{2 if abs(scaled) < 9.995 else 1}f}{suffix}"
    raise AssertionError("the last scale takes every number")


def tick(value: float) -> str:
    """As short as an axis wants it: 0.5, 20, 1.5K, 4M."""
    for scale, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale * 0.9995:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def grouped(value: float) -> str:
    """A whole number with thousands separated: 12,345."""
    return f"{round(value):,}"


def fixed(value: float) -> str:
    """Three decimals, and more where they would all be zeros."""
    if value == 0 or abs(value) >= 0.0005:
        return f"{value:.3f}"
    return f"{value:.1e}"


def count(value: float) -> str:
    """A number of things, or a mean of such numbers: 86, 84.7, 1,012."""
    if value == round(value) or abs(value) >= 1000:
        return grouped(value)
    return f"{value:.1f}" if abs(value) >= 0.05 else f"{value:.1g}"


def signed(value: float, show: Callable[[float], str] = fixed) -> str:
    """A difference with its sign: +0.012."""
    return f"{MINUS if value < 0 else '+' if value else ''}{show(abs(value))}"


def as_percent(share: float) -> str:
    """A share in percent, without the sign: 0.42."""
    return f"{100 * share:.2f}"


def negative(text: str) -> str:
    """With the minus that is as wide as a plus."""
    return text.replace("-", MINUS) if text.startswith("-") else text


def percents(*values: float | None) -> list[str]:
    """Percents that are shown together, with the same decimals: as few as tell each of them from zero, at most 3."""
    known = [abs(value) for value in values if value is not None and math.isfinite(value)]
    smallest, largest = min(known, default=0.0), max(known, default=0.0)
    spread = max(known, default=0.0) - smallest
    decimals = 0 if smallest >= 10 and (spread >= 2 or len(known) == 1) else 1
    while decimals < 3 and known and largest > 0 and 0 < smallest < 0.5 * 10.0**-decimals:
        decimals += 1
    return [ABSENT if value is None else negative(f"{value:.{decimals}f}") for value in values]


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def absent(value: float | None, show: Callable[[float], str]) -> str:
    """``show(value)``, or a dash where nothing was measured."""
    return ABSENT if value is None else show(value)
