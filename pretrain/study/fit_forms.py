"""How a measure may depend on a scale, and the robust least-squares fit of one such form.

Letters: x a scale (parameters, tokens, FLOPs; positive), y the measure, u = ln(x / x0) with x0 the geometric mean of
the points, v = (y - y0) / s with y0 the median and s the spread of y. n observations, p parameters.

    constant      v = c                           y = a
    log-linear    v = c + k u                     y = a + b ln x
    power law     v = c + k (1 - e^(-b u)) / b    y = E + A x^(-b)

The right-hand forms are the ones meant; the left-hand ones are fitted. c and k are the value and the slope in the
middle of the data, so they hardly depend on b, and b -> 0 is the logarithm: nothing blows up on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

Floats = npt.NDArray[np.float64]

EXPONENTS = (0.01, 3.0)  # below: a logarithm in all but name; above: flat from the second point on
STARTS = (0.1, 0.4, 1.2)  # exponents that a fit starts from
FAR = 20  # spreads of the seeds; less the robust fit takes, more would widen every interval
TURN = 1.5  # residuals above this many spreads of the seeds count by their size, not by their square
MOST_EVALUATIONS = 200
TOLERANCE = 1e-6  # of steps, gradient and loss: far below any interval


@dataclass(frozen=True)
class Form:
    """One of the three.

    Attributes:
        parameters: how many.
        fewest: different scales that a fit needs: one more than parameters, so that it can be wrong.
        value: (theta [p], u [n]) -> v [n].
        slopes: the same -> its derivative [n, p].
    """

    name: str
    parameters: int
    fewest: int
    value: Callable[[Floats, Floats], Floats]
    slopes: Callable[[Floats, Floats], Floats]


@dataclass(frozen=True)
class Units:
    """From x and y to u and v and back."""

    x0: float
    y0: float
    spread: float

    @staticmethod
    def of(x: Floats, y: Floats) -> Units:
        """Of observations x [n] > 0 and y [n], all finite."""
        spread = float(np.std(y))
        tiny = 1e-12 * max(1.0, float(np.abs(y).max()))
        return Units(float(np.exp(np.log(np.unique(x)).mean())), float(np.median(y)), max(spread, tiny))

    def u(self, x: Floats) -> Floats:
        return np.asarray(np.log(x / self.x0), dtype=np.float64)

    def v(self, y: Floats) -> Floats:
        return np.asarray((y - self.y0) / self.spread, dtype=np.float64)

    def y(self, v: Floats) -> Floats:
        return np.asarray(self.y0 + self.spread * v, dtype=np.float64)


def _bend(b: float, u: Floats) -> Floats:
    return np.asarray(-np.expm1(-b * u) / b, dtype=np.float64)


def _power_slopes(theta: Floats, u: Floats) -> Floats:
    _, k, b = theta
    return np.stack([np.ones_like(u), _bend(b, u), k * (u * np.exp(-b * u) - _bend(b, u)) / b], axis=-1)


CONSTANT = Form("constant", 1, 2, lambda t, u: t[0] + 0 * u, lambda t, u: np.ones((len(u), 1)))
LOG_LINEAR = Form(
    "log-linear", 2, 3, lambda t, u: t[0] + t[1] * u, lambda t, u: np.stack([np.ones_like(u), u], axis=-1)
)
POWER_LAW = Form("power law", 3, 4, lambda t, u: t[0] + t[1] * _bend(t[2], u), _power_slopes)
FORMS = (CONSTANT, LOG_LINEAR, POWER_LAW)


def fit_form(form: Form, u: Floats, v: Floats, noise: float, near: Floats | None = None) -> Floats | None:
    """Parameters theta [p] of least soft-L1 loss, or None where the solver does not converge.

    Args:
        u, v: [n], in :class:`Units`; u has at least as many different values as the form has parameters.
        noise: spread of v about its curve; residuals far above it are outliers.
        near: parameters of a like fit to start from; None: several starts, the best result.
    """
    exponents: Sequence[float] = STARTS if form is POWER_LAW else (0.0,)
    if near is not None and form is POWER_LAW:
        exponents = (float(near[2]),)
    bounds = ([-np.inf] * form.parameters, [np.inf] * form.parameters)
    if form is POWER_LAW:
        bounds[0][2], bounds[1][2] = EXPONENTS
    best: tuple[float, Floats] | None = None
    for exponent in exponents:
        found = least_squares(
            lambda theta: form.value(theta, u) - v,
            _start(form, u, v, exponent),
            jac=lambda theta: form.slopes(theta, u),
            bounds=bounds,
            loss="soft_l1",
            f_scale=TURN * noise,
            max_nfev=MOST_EVALUATIONS,
            ftol=TOLERANCE,
            xtol=TOLERANCE,
            gtol=TOLERANCE,
        )
        if found.success and np.isfinite(found.x).all() and (best is None or found.cost < best[0]):
            best = float(found.cost), np.asarray(found.x, dtype=np.float64)
    return None if best is None else best[1]


def _start(form: Form, u: Floats, v: Floats, exponent: float) -> Floats:
    """Plain least squares for what is linear, at a given exponent inside its bounds."""
    if form is CONSTANT:
        return np.array([np.median(v)])
    low, high = EXPONENTS
    inside = min(max(exponent, low * 1.05), high * 0.95)
    bent = _bend(inside, u) if form is POWER_LAW else u
    linear = np.linalg.lstsq(np.stack([np.ones_like(u), bent], axis=-1), v, rcond=None)[0]
    return np.array([*linear, inside][: form.parameters])


def noise_of(u: Floats, v: Floats) -> float:
    """A robust spread of v [n] about its curve: of the seeds at one scale where there are any, else about a line.

    At least a thousandth of the spread of v, so that a perfect curve has no outliers.
    """
    parts = []
    for value in np.unique(u):
        group = v[u == value]
        if len(group) > 1:
            parts.append((group - group.mean()) * np.sqrt(len(group) / (len(group) - 1)))
    if not parts:
        line = np.polynomial.polynomial.polyfit(u, v, 1 if len(np.unique(u)) > 1 else 0)
        parts.append(v - np.polynomial.polynomial.polyval(u, line))
    return max(1.4826 * float(np.median(np.abs(np.concatenate(parts)))), 1e-3)


def far_off(u: Floats, v: Floats) -> npt.NDArray[np.bool_]:
    """[n], observations more than ``FAR`` spreads from the median of their scale, near which most of its seeds lie."""
    far, limit = np.zeros(len(v), dtype=np.bool_), FAR * noise_of(u, v)
    for value in np.unique(u):
        group = u == value
        away = np.abs(v[group] - np.median(v[group])) > limit
        if 2 * away.sum() < len(away):  # else which of them are astray is not to be told
            far[group] = away
    return far
