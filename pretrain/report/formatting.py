"""Numbers as people read them, the same in tables, figures and the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable

ABSENT = "–"


def compact(value: float) -> str:
    """Three digits and a suffix: 8.14, 98.2, 1.2K, 29.2K, 4.1M."""
    if not math.isfinite(value):
        return "inf" if value > 0 else str(value)
    for limit, suffix in ((999_950_000, "B"), (999_950, "M"), (999.95, "K")):
        if abs(value) >= limit:
            scale = {"B": 1e9, "M": 1e6, "K": 1e3}[suffix]
            return f"{value / scale:.1f}{suffix}"
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}"


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
    """A difference: +0.012, −0.510."""
    return f"{'−' if value < 0 else '+'}{abs(value):.3f}"


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
