"""What a fit says, in plain words computed from its intervals."""

from __future__ import annotations

import math

from pretrain.report.formatting import MINUS, tick
from pretrain.study.fit_forms import LOG_LINEAR, POWER_LAW
from pretrain.study.fits import Fit, Interval

SYMBOLS = {"parameters_without_embeddings": "N", "vocab_size": "V", "planned_tokens": "D", "flops": "C"}
SCALES = {
    "parameters_without_embeddings": "parameters without embeddings",
    "vocab_size": "vocabulary size",
    "planned_tokens": "training tokens",
    "flops": "training FLOPs",
}


def number(value: float) -> str:
    """Three significant digits with a true minus sign."""
    text = f"{abs(value):.3g}" if abs(value) < 9.995e5 else tick(abs(value))
    return (MINUS if value < 0 and float(f"{value:.3g}") else "") + text


def with_interval(interval: Interval) -> str:
    """0.21 [0.17, 0.25]: as many decimals as give the interval two digits."""
    value, low, high = (
        in_decimals(number, decimals(interval)) for number in (interval.value, interval.low, interval.high)
    )
    return f"{value} [{low}, {high}]"


def decimals(interval: Interval) -> int:
    """How many decimals say two digits of half the interval; three digits of the value where it has no width."""
    half = (interval.high - interval.low) / 2
    size = half if half > 1e-12 * abs(interval.value) else abs(interval.value) / 10
    return min(max(1 - math.floor(math.log10(size)), 0), 6) if size > 0 and math.isfinite(size) else 2


def in_decimals(value: float, places: int) -> str:
    """With a true minus sign, and none before zero."""
    text = f"{abs(value):,.{places}f}"
    return (MINUS if value < 0 and text.strip("0.,") else "") + text


def negated(interval: Interval) -> Interval:
    return Interval(-interval.value, -interval.high, -interval.low)


def size_text(value: float) -> str:
    """A scale: 200K, 12.8M, 8.90e12."""
    return tick(value) if value < 1e12 else f"{value:.2e}".replace("e+", "e")


def over(fit: Fit) -> str:
    """The range of the data: 200K to 12.8M."""
    return f"{size_text(float(fit.scales[0]))} to {size_text(float(fit.scales[-1]))}"


def sentence(fit: Fit, measure: str, scale: str) -> str:
    """The whole statement.

    Args:
        measure: what was fitted, as the subject of a sentence; ``scale``: a column of :data:`SYMBOLS`, or another name.
    """
    text = f"{measure[:1].upper()}{measure[1:]} {predicate(fit, SYMBOLS.get(scale, scale))}."
    if fit.scattered and fit.verdict != "scattered":
        text += " The sizes lie off that curve by more than their seeds explain."
    if fit.dropped:
        text += f" {fit.dropped} value{'s' if fit.dropped > 1 else ''} that cannot be fitted (not finite) left out."
    return text + astray(fit)


def astray(fit: Fit) -> str:
    """The sentence, with a space before it, on values left out as they are far from the others; or nothing."""
    if not fit.astray:
        return ""
    shown = ", ".join(number(value) for value in fit.astray[:3]) + (", …" if len(fit.astray) > 3 else "")
    count = "1 value" if len(fit.astray) == 1 else f"{len(fit.astray)} values"
    return f" {count} far from the other seeds of {'its' if len(fit.astray) == 1 else 'their'} size ({shown}) left out."


def predicate(fit: Fit, symbol: str) -> str:
    """What the measure does, without the measure: "falls as N^-0.21 [-0.26, -0.17] towards 3.1 [3.0, 3.2]"."""
    if fit.verdict == "too few":
        count = len(fit.scales)
        return (
            f"was measured at {count or 'no'} {'size' if count == 1 else 'sizes'}: too few sizes to fit "
            f"(a logarithm needs {LOG_LINEAR.fewest}, a power law {POWER_LAW.fewest})"
        )
    assert fit.change is not None, "only a fit of too few sizes has no change"
    if fit.verdict == "flat":
        return (
            f"does not change measurably with {symbol} over {over(fit)} "
            f"(from the smallest to the largest {with_interval(fit.change)})"
        )
    if fit.verdict == "scattered":
        return f"differs between sizes by more than the seeds do, but follows none of the curves over {over(fit)}"
    falls = fit.change.value < 0
    curve = fit.curves[0]
    if fit.verdict == "power law":
        power = with_interval(negated(curve.exponent))
        if falls:
            return f"falls as {symbol}^{power} towards {with_interval(curve.limit)}"
        return f"rises towards {with_interval(curve.limit)}, the gap closing as {symbol}^{power}"
    step = curve.per_doubling if not falls else negated(curve.per_doubling)
    text = f"{'falls' if falls else 'rises'} by {with_interval(step)} with each doubling of {symbol}"
    if fit.verdict == "cannot tell":
        return f"{text}; the data cannot tell a power law from a logarithm"
    if len(fit.scales) < POWER_LAW.fewest:
        return f"{text}; {len(fit.scales)} sizes are too few to try a power law"
    return text
