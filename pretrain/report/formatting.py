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


def signed(value: float) -> str:
    """A difference with its sign: +0.012."""
    return f"{MINUS if value < 0 else '+'}{abs(value):.3f}"


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
