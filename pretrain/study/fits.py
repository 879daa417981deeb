"""A measure against a scale: which curve, with what certainty, and what may be said about it.

Three forms are fitted by robust least squares (:mod:`pretrain.study.fit_forms`). Their uncertainty comes from a
bootstrap that draws the scales with replacement and then the seeds of each; the deviations of n seeds from their mean
are stretched by sqrt(n / (n - 1)), without which few seeds look too certain (Davison and Hinkley 1997).
Forms are compared by their error on a scale that was left out, each in turn. A richer form is taken only where it is
better by more than the standard error of the difference over the scales left out, and where the interval of what it
adds (the slope, the exponent) says that it is there. A seed that diverged (:func:`pretrain.study.fit_forms.far_off`)
is left out, and counted: drawn again and again, it would widen the interval of every slope until it holds zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from pretrain.study.fit_forms import (
    CONSTANT,
    EXPONENTS,
    FORMS,
    LOG_LINEAR,
    POWER_LAW,
    Floats,
    Form,
    Units,
    far_off,
    fit_form,
    noise_of,
)

Verdict = Literal["too few", "flat", "scattered", "log-linear", "power law", "cannot tell"]
DRAWS = 200
CONFIDENCE = 0.95
BEND = 0.25  # a power law's slope falls by e^-BEND over the data, or it is a logarithm in all but name
SCATTER = 0.01  # chance of a lack of fit as large as this, if the form were right


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(value: float, draws: Floats) -> Interval:
        """The percentiles of draws [B]; those include ``value``, so that it never lies outside."""
        low, high = np.percentile(draws, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]) if len(draws) else (value,) * 2
        return Interval(value, float(min(low, value)), float(max(high, value)))

    def excludes(self, number: float) -> bool:
        return not self.low <= number <= self.high


@dataclass(frozen=True)
class Curve:
    """A fitted form.

    Attributes:
        theta: [p], in units.
        draws: [B, p], the refits of the bootstrap that converged.
        failed: the refits that did not.
    """

    form: Form
    units: Units
    theta: Floats
    draws: Floats
    failed: int

    def at(self, x: npt.ArrayLike) -> Floats:
        """y [n] at x [n]."""
        return self.units.y(self.form.value(self.theta, self.units.u(np.asarray(x, dtype=np.float64))))

    def draws_at(self, x: npt.ArrayLike) -> Floats:
        """y [B, n] of every refit at x [n]."""
        u = self.units.u(np.asarray(x, dtype=np.float64))
        return np.stack([self.units.y(self.form.value(theta, u)) for theta in self.draws])

    @property
    def per_doubling(self) -> Interval:
        """Change of y with each doubling of x: log-linear."""
        scale = self.units.spread * np.log(2)
        return Interval.of(float(self.theta[1] * scale), self.draws[:, 1] * scale)

    @property
    def exponent(self) -> Interval:
        """b: power law."""
        return Interval.of(float(self.theta[2]), self.draws[:, 2])

    @property
    def limit(self) -> Interval:
        """E, what y goes towards: power law."""
        towards = self.draws[:, 0] + self.draws[:, 1] / self.draws[:, 2]
        value = float(self.theta[0] + self.theta[1] / self.theta[2])
        return Interval.of(float(self.units.y(np.array(value))), self.units.y(towards))

    def natural(self) -> dict[str, float]:
        """The parameters by their letters: a; a, b; or E, A, b (head of :mod:`pretrain.study.fit_forms`)."""
        x0, spread, level = self.units.x0, self.units.spread, float(self.units.y(self.theta[:1])[0])
        if self.form is CONSTANT:
            return {"a": level}
        slope = float(self.theta[1]) * spread
        if self.form is LOG_LINEAR:
            return {"a": level - slope * float(np.log(x0)), "b": slope}
        b = float(self.theta[2])
        return {"E": self.limit.value, "A": -slope / b * x0**b, "b": b}


@dataclass(frozen=True)
class HeldOut:
    """Mean absolute error at scales that a form was not fitted to.

    Attributes:
        each: [k], one a scale, from the smallest to the largest; the last is an extrapolation.
    """

    each: Floats

    @property
    def mean(self) -> float:
        return float(self.each.mean())

    @property
    def largest(self) -> float:
        return float(self.each[-1])


@dataclass(frozen=True)
class Fit:
    """What the data say about a measure against a scale.

    Attributes:
        verdict: "too few" scales to fit; "flat": no measurable change; "scattered": scales differ by more than their
            seeds, but along no curve; or the curve, "cannot tell" meaning a power law or a logarithm.
        x, y: [n], the observations that were used.
        dropped: observations left out: not finite, or at a scale that is not positive.
        astray: [m], finite values left out as they are far from the other seeds of their scale.
        curves: the chosen one first; where the data cannot tell, the other after it; none where there were too few.
        held_out: by the name of the form, for the forms that could be compared.
        change: y at the largest scale less y at the smallest, by the line for "flat" and "scattered".
        scattered: the scales lie off the chosen curve by more than their seeds explain.
    """

    verdict: Verdict
    x: Floats
    y: Floats
    dropped: int
    curves: tuple[Curve, ...] = ()
    held_out: dict[str, HeldOut] | None = None
    change: Interval | None = None
    scattered: bool = False
    astray: tuple[float, ...] = ()

    @property
    def scales(self) -> Floats:
        """The different x, rising [k]."""
        return np.unique(self.x)

    @property
    def depends(self) -> bool:
        """Whether y was found to depend on x: only then may a curve leave the range of the data."""
        return self.verdict in ("log-linear", "power law", "cannot tell")

    def band(self, x: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
        """The chosen curve and its 95 % band at x, each [n]; the band is over all forms that cannot be told apart.

        Raises:
            ValueError: nothing was fitted, or x leaves the range of the data though no dependence was found.
        """
        wanted = np.asarray(x, dtype=np.float64)
        if not self.curves:
            raise ValueError("nothing was fitted: there is no curve to draw")
        outside = (wanted < self.x.min() * (1 - 1e-9)) | (wanted > self.x.max() * (1 + 1e-9))
        if outside.any() and not self.depends:
            raise ValueError("no dependence on the scale was found: nothing can be said outside the range of the data")
        value = self.curves[0].at(wanted)
        draws = np.concatenate([curve.draws_at(wanted) for curve in self.curves] + [value[None]])
        low, high = np.percentile(draws, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)], axis=0)
        return value, np.minimum(low, value), np.maximum(high, value)


def fit_measure(x: Sequence[float], y: Sequence[float], *, draws: int = DRAWS, seed: int = 0) -> Fit:
    """Fit y against x and say which form the data support.

    Args:
        x, y: one observation each, several (seeds) at the same x as a rule. Those that are not finite are dropped, and
            those far from the other seeds at their x.
        draws: refits of the bootstrap; ``seed`` decides them.
    """
    all_x, all_y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    good = np.isfinite(all_x) & np.isfinite(all_y) & (all_x > 0)
    xs, ys = all_x[good], all_y[good]
    dropped = int((~good).sum())
    # Of three single values about every sixth set of pure noise would look like a law.
    fewest = LOG_LINEAR.fewest + (len(np.unique(xs)) == len(xs))
    if len(np.unique(xs)) < fewest:
        return Fit("too few", xs, ys, dropped)
    units = Units.of(xs, ys)
    far = far_off(units.u(xs), units.v(ys))
    astray, xs, ys = tuple(ys[far].tolist()), xs[~far], ys[~far]
    units = Units.of(xs, ys)
    u, v = units.u(xs), units.v(ys)
    noise = noise_of(u, v)
    tried = [form for form in FORMS if form.fewest <= len(np.unique(u))]
    curves = {form.name: curve for form in tried if (curve := _bootstrapped(form, units, u, v, noise, draws, seed))}
    held_out = {form.name: errors for form in tried if (errors := _leave_out(form, u, v, noise, units.spread))}
    line = curves[LOG_LINEAR.name]
    chosen = [curves[CONSTANT.name]]
    if _better(held_out, CONSTANT, LOG_LINEAR) and line.per_doubling.excludes(0):
        chosen = [line]
    power = curves.get(POWER_LAW.name)
    if power is not None:
        settled = power.exponent.low * np.log(xs.max() / xs.min()) > BEND and power.exponent.high < EXPONENTS[1] * 0.99
        beats = all(_better(held_out, form, POWER_LAW) for form in (CONSTANT, LOG_LINEAR))
        if settled and beats and _change(power, xs).excludes(0):
            chosen = [power]
        elif chosen == [line] and not _better(held_out, POWER_LAW, LOG_LINEAR):
            chosen = [line, power]
    scattered = _lack_of_fit(chosen[0], xs, ys)
    verdict: Verdict = "cannot tell" if len(chosen) > 1 else _verdict(chosen[0].form, scattered)
    change = _change(line if chosen[0].form is CONSTANT else chosen[0], xs)
    return Fit(verdict, xs, ys, dropped, tuple(chosen), held_out, change, scattered, astray)


def _verdict(form: Form, scattered: bool) -> Verdict:
    if form is CONSTANT:
        return "scattered" if scattered else "flat"
    return "power law" if form is POWER_LAW else "log-linear"


def _change(curve: Curve, x: Floats) -> Interval:
    ends = np.array([x.min(), x.max()])
    draws = curve.draws_at(ends)
    return Interval.of(float(np.diff(curve.at(ends))[0]), draws[:, 1] - draws[:, 0])


def _bootstrapped(form: Form, units: Units, u: Floats, v: Floats, noise: float, draws: int, seed: int) -> Curve | None:
    """The form fitted to all, and to every draw; None where the fit or most refits fail."""
    theta = fit_form(form, u, v, noise)
    if theta is None:
        return None
    random = np.random.default_rng(seed)
    refits = [fit_form(form, *_draw(u, v, form.parameters, random), noise, near=theta) for _ in range(draws)]
    converged = [refit for refit in refits if refit is not None]
    if len(converged) < draws / 2:
        return None
    return Curve(form, units, theta, np.array(converged), draws - len(converged))


def _draw(u: Floats, v: Floats, fewest: int, random: np.random.Generator) -> tuple[Floats, Floats]:
    """Scales with replacement, drawn again until ``fewest`` differ; then as many seeds of each, with replacement."""
    scales = np.unique(u)
    while len(np.unique(chosen := random.choice(scales, len(scales)))) < fewest:
        pass
    drawn_u, drawn_v = [], []
    for scale in chosen:
        seeds = v[u == scale]
        stretch = np.sqrt(len(seeds) / (len(seeds) - 1)) if len(seeds) > 1 else 0.0
        drawn = random.choice(seeds, len(seeds))
        drawn_v.append(seeds.mean() + stretch * (drawn - seeds.mean()) if stretch else drawn)
        drawn_u.append(np.full(len(seeds), scale))
    return np.concatenate(drawn_u), np.concatenate(drawn_v)


def _leave_out(form: Form, u: Floats, v: Floats, noise: float, spread: float) -> HeldOut | None:
    """Errors in the unit of y at each scale, by the form fitted to the others; None where a fit does not converge."""
    errors = []
    for scale in np.unique(u):
        out = u == scale
        theta = fit_form(form, u[~out], v[~out], noise)
        if theta is None:
            return None
        errors.append(float(np.abs(v[out] - form.value(theta, u[out])).mean()) * spread)
    return HeldOut(np.array(errors))


def _better(held_out: dict[str, HeldOut], simple: Form, rich: Form) -> bool:
    """Whether ``rich`` errs less by more than the standard error, and not more at the largest scale."""
    if simple.name not in held_out or rich.name not in held_out:
        return False
    gain = held_out[simple.name].each - held_out[rich.name].each
    error = float(gain.std(ddof=1)) / np.sqrt(len(gain))
    return bool(gain.mean() > error and gain[-1] >= 0)


def _lack_of_fit(curve: Curve, x: Floats, y: Floats) -> bool:
    """F test of the means of the scales about the curve against the seeds about their means; False without seeds."""
    scales, seeds = np.unique(x), len(y) - len(np.unique(x))
    free = len(scales) - curve.form.parameters
    if seeds < 1 or free < 1:
        return False
    groups = [y[x == scale] for scale in scales]
    pure = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / seeds
    means = np.array([group.mean() for group in groups])
    off = (np.array([len(group) for group in groups]) * (means - curve.at(scales)) ** 2).sum() / free
    if off < 1e-18 * max(1.0, float((y**2).max())):  # rounding
        return False
    return pure == 0 or float(stats.f.sf(off / pure, free, seeds)) < SCATTER
