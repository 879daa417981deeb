"""Figures of what was recorded while training: mean over the seeds of a method, band from the lowest to the highest.

Each takes any number of methods and returns a matplotlib Figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.evaluation.group_names import DECILES
from pretrain.report.figure_style import (
    colour,
    compact_ticks,
    draw_curve,
    is_empty,
    marker,
    method_legend,
    not_measured,
    styled,
    token_axis,
)
from pretrain.report.methods import Curve, Method
from pretrain.report.run_records import Floats

SMOOTHING = 0.02  # of the logged points: how far to each side the smoothed loss looks
STEEP = 0.04  # of the tokens: the fall from the loss of an untrained model takes no room from the rest
SHAPE_PANELS = (
    (("isotropy",), "Isotropy I(W), all rows", True),
    (("seen_rows", "isotropy"), "Isotropy, ids seen in training", True),
    (("mean_cosine",), "Mean cosine of two rows", True),
    (("mean_shift",), "Mean shift", True),
    (("effective_rank",), "Effective rank", False),
    (("top_singular_share",), "Share of the strongest direction", True),
)


@styled
def training_figure(methods: Sequence[Method]) -> Figure:
    """Loss over tokens, and validation perplexity of rare and of frequent tokens."""
    figure = Figure(figsize=(9.6, 3.9))
    losses, perplexities = figure.subplots(1, 2)
    shown: list[Curve] = []
    for i, method in enumerate(methods):
        for record in method.records:
            losses.plot(*record.series("loss"), color=colour(i), alpha=0.22 / len(method.records), linewidth=0.8)
        curve = method.curve("loss")
        if len(curve.tokens):
            smooth = _smooth(curve.mean)
            losses.plot(curve.tokens, smooth, color=colour(i))
            shown.append(replace(curve, mean=smooth))
        validation = method.curve("validation_loss")
        shown.append(validation)
        losses.plot(validation.tokens, validation.mean, color=colour(i), linestyle="none", marker=marker(i),
                    markersize=4.5, markerfacecolor="white")  # fmt: skip
        for group, line in (("rare", "-"), ("frequent", "--")):
            draw_curve(perplexities, method.curve("validation_perplexity", group), i, line)
    losses.set_title("Loss: lines training, open markers validation")
    losses.set_ylabel("cross-entropy (nats per token)")
    if (limits := _limits(shown)) is not None:
        losses.set_ylim(limits)
    else:
        not_measured(losses, "loss while training")
    perplexities.set_title("Validation perplexity: solid rare, dashed frequent")
    perplexities.set_ylabel("perplexity (log scale)")
    if is_empty(perplexities):
        not_measured(perplexities, "validation perplexity")
    else:
        perplexities.set_yscale("log")
        compact_ticks(perplexities.yaxis)
    for axes in (losses, perplexities):
        token_axis(axes)
    method_legend(figure, methods)
    return figure


@styled
def geometry_figure(methods: Sequence[Method]) -> Figure:
    """How the shape of the output embedding went while training."""
    figure = Figure(figsize=(9.6, 5.6))
    for axes, (path, title, share) in zip(figure.subplots(2, 3).flat, SHAPE_PANELS, strict=True):
        _curves(axes, methods, path)
        axes.set_title(title)
        if share:
            axes.set_ylim(min(0.0, 0.0 if is_empty(axes) else axes.dataLim.ymin) - 0.02, 1.02)
        elif not is_empty(axes):
            axes.set_ylim(bottom=0)
    method_legend(figure, methods)
    return figure


@styled
def gates_figure(methods: Sequence[Method]) -> Figure:
    """Norms and gates by how frequent a token is, and how much of the gradient gates took."""
    figure = Figure(figsize=(9.6, 6.2))
    (norms, gates), (shares, fractions) = figure.subplots(2, 2)
    _by_decile(norms, methods, (("row_norm_by_decile", "-"),))
    norms.set_title("Norm of a row at the end")
    norms.set_ylabel("mean norm")
    if not is_empty(norms):
        norms.set_ylim(bottom=0)
    _by_decile(gates, methods, (("g1_by_decile", "-"), ("g2_by_decile", "--")))
    gates.set_title("Gates at the end: solid g1, dashed g2")
    gates.set_ylabel("mean gate (1 is open)")
    gates.set_ylim(-0.03, 1.05)
    _curves(shares, methods, ("gated_share", "of_all"), ("gated_share", "of_rare"))
    shares.set_title("Gated away: solid of all, dashed of rare")
    shares.set_ylabel("share of the gradient")
    shares.set_ylim(-0.03, 1.05)
    _curves(fractions, methods, ("rare_fraction",))
    fractions.set_title("Rare ids while training")
    fractions.set_ylabel("share of the vocabulary")
    if not is_empty(fractions):
        fractions.set_ylim(bottom=0)
    method_legend(figure, methods)
    return figure


def _curves(axes: Axes, methods: Sequence[Method], *paths: tuple[str, ...]) -> None:
    for i, method in enumerate(methods):
        for path, line in zip(paths, ("-", "--"), strict=False):
            draw_curve(axes, method.curve(*path), i, line)
    if is_empty(axes):
        not_measured(axes, paths[0][-1].replace("_", " ") if paths[0][0] != "gated_share" else "gates")
    token_axis(axes)


def _by_decile(axes: Axes, methods: Sequence[Method], keys: Sequence[tuple[str, str]]) -> None:
    """What was last measured, the ids that never occur apart at the right."""
    places = {name: place + 1.0 for place, name in enumerate(DECILES)}
    places["never_seen"] += 0.6
    for i, method in enumerate(methods):
        for key, line in keys:
            found = {places[part]: values for part, values in method.last(key).items() if part in places}
            for joined in (True, False):  # the deciles by a line, never seen on its own
                x = sorted(place for place in found if (place <= 10) == joined)
                values = [found[place] for place in x]
                if not x:
                    continue
                inside = colour(i) if line == "-" else "white"
                axes.plot(x, [np.mean(value) for value in values], color=colour(i), marker=marker(i), markersize=4.5,
                          linestyle=line if joined else "none", markerfacecolor=inside)  # fmt: skip
                low, high = [min(value) for value in values], [max(value) for value in values]
                if joined:
                    axes.fill_between(x, low, high, color=colour(i), alpha=0.18, linewidth=0)
                else:
                    axes.vlines(x, low, high, color=colour(i), linewidth=1.2)
    if is_empty(axes):
        not_measured(axes, keys[0][0].replace("_", " ").replace("g1", "gates"))
    axes.set_xlim(0.5, places["never_seen"] + 0.7)
    axes.set_xticks([1, 4, 7, 10, places["never_seen"]], ["1", "4", "7", "10", "never\nseen"])
    axes.set_xlabel("tenth of the vocabulary, 1 the most frequent")


def _limits(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """That hold all values but those above the others in the first :data:`STEEP` of the tokens; None with no value."""
    found = [curve for curve in curves if np.isfinite(curve.mean).any()]
    if not found:
        return None
    lowest = min(_finite(curve.mean).min() for curve in found)
    later = [_finite(curve.mean[curve.tokens >= STEEP * curve.tokens[-1]]) for curve in found]
    highest = max((values.max() for values in later if len(values)), default=lowest)
    margin = 0.06 * (highest - lowest) + 1e-3
    return lowest - 2 * margin, highest + margin


def _finite(values: Floats) -> Floats:
    """A run that diverged may have recorded others."""
    return values[np.isfinite(values)]


def _smooth(values: Floats) -> Floats:
    """Centred moving average, narrower towards both ends: a falling curve is not shifted to the right."""
    place = np.arange(len(values))
    reach = np.minimum(math.ceil(SMOOTHING * len(values)), np.minimum(place, place[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    smooth: Floats = (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)
    return smooth
