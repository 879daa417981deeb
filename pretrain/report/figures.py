"""The figures of a report. Each takes any number of runs and returns a matplotlib Figure.

Letters: V vocabulary, D hidden size, s singular values, n occurrences of a token in the training data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pretrain.report.figure_style import (
    FAINT,
    INK,
    colour,
    compact_ticks,
    marker,
    not_measured,
    run_legend,
    short,
    styled,
    token_axis,
)
from pretrain.report.run_records import Floats, RunRecord

SMOOTHING = 0.02  # of the logged points: how far to each side the smoothed loss looks
MOST_POINTS = 20_000  # drawn of one run's projection
FREQUENCY_BINS = 12


@styled
def training_figure(records: Sequence[RunRecord]) -> Figure:
    """Loss over tokens, and validation perplexity of rare and of frequent tokens."""
    figure = Figure(figsize=(9.6, 3.9))
    losses, perplexities = figure.subplots(1, 2)
    lowest, highest = math.inf, -math.inf
    for i, record in enumerate(records):
        tokens, loss = record.series("loss")
        if len(tokens):
            smooth = _smooth(loss)
            losses.plot(tokens, loss, color=colour(i), alpha=0.22, linewidth=0.8)
            losses.plot(tokens, smooth, color=colour(i))
            lowest, highest = min(lowest, smooth.min()), max(highest, smooth[min(len(smooth) // 25, len(smooth) - 1)])
        losses.plot(*record.series("validation_loss"), color=colour(i), linestyle="none", marker=marker(i),
                    markersize=4.5, markerfacecolor="white")  # fmt: skip
        for group, line in (("rare", "-"), ("frequent", "--")):
            perplexities.plot(*record.series("validation_perplexity", group), color=colour(i), linestyle=line,
                              marker=marker(i), markersize=3)  # fmt: skip
    losses.set_title("Loss: lines training, open markers validation")
    losses.set_ylabel("cross-entropy (nats per token)")
    if math.isfinite(lowest):
        margin = 0.06 * (highest - lowest) + 1e-3
        losses.set_ylim(lowest - 2 * margin, highest + margin)
    else:
        not_measured(losses, "loss")
    perplexities.set_title("Validation perplexity: solid rare, dashed frequent")
    perplexities.set_ylabel("perplexity (log scale)")
    _log_axis(perplexities, "validation perplexity")
    for axes in (losses, perplexities):
        token_axis(axes)
    run_legend(figure, records)
    return figure


@styled
def geometry_figure(records: Sequence[RunRecord]) -> Figure:
    """Isotropy and mean cosine while training."""
    figure = Figure(figsize=(9.6, 3.6))
    panels = (
        ("isotropy", "Isotropy I(W): 1 is a round cloud"),
        ("mean_cosine", "Mean cosine of two rows: 0 in a round cloud"),
    )
    for axes, (key, title) in zip(figure.subplots(1, 2), panels, strict=True):
        low = 0.0
        for i, record in enumerate(records):
            tokens, values = record.series(key)
            axes.plot(tokens, values, color=colour(i), marker=marker(i), markersize=3)
            low = min([low, *values])
        axes.set_title(title)
        axes.set_ylabel(key.replace("_", " "))
        axes.set_ylim(low - 0.02, 1.02)
        if not axes.dataLim.width:
            not_measured(axes, key.replace("_", " "))
        token_axis(axes)
    run_legend(figure, records)
    return figure


@styled
def spectrum_figure(records: Sequence[RunRecord]) -> Figure:
    """Singular values over the first one, both axes logarithmic."""
    figure = Figure(figsize=(4.8, 3.7))
    axes = figure.subplots()
    longest = 1
    for i, record in enumerate(records):
        values = record.arrays["singular_values"]
        share = values[values > 1e-7 * values[0]] / values[0]
        place = np.arange(1, len(share) + 1)
        axes.plot(place, share, color=colour(i), marker=marker(i), markersize=4, markevery=slice(8))
        longest = max(longest, len(values))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.93, longest * 1.08)
    axes.set_title("Singular values of the embedding")
    axes.set_xlabel("place of the singular value")
    axes.set_ylabel("share of the first, s / s₁ (log scale)")
    compact_ticks(axes.xaxis)
    compact_ticks(axes.yaxis)
    run_legend(figure, records)
    return figure


@styled
def cosine_figure(records: Sequence[RunRecord]) -> Figure:
    """Distribution of the cosine of two rows."""
    figure = Figure(figsize=(4.8, 3.7))
    axes = figure.subplots()
    low, high = 0.0, 0.0
    for i, record in enumerate(records):
        edges, counts = record.arrays["cosine_edges"], record.arrays["cosine_counts"]
        density = counts / (max(counts.sum(), 1) * np.diff(edges))
        axes.stairs(density, edges, color=colour(i), linewidth=1.5)
        axes.stairs(density, edges, color=colour(i), alpha=0.16, fill=True)
        mean = record.evaluation["mean_cosine"]
        axes.plot(mean, -0.035, marker="^", color=colour(i), markersize=6, clip_on=False,
                  transform=axes.get_xaxis_transform())  # fmt: skip
        used = np.flatnonzero(density > 2e-3 * density.max())
        low, high = min(low, edges[used[0]]), max(high, edges[used[-1] + 1])
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlim(max(-1, low - 0.08), min(1, high + 0.08))
    axes.set_ylim(bottom=0)
    axes.tick_params(axis="x", pad=7)
    axes.set_title("Cosine of two rows, triangles at the mean")
    axes.set_xlabel("cosine")
    axes.set_ylabel("density")
    run_legend(figure, records)
    return figure


@styled
def norm_figure(records: Sequence[RunRecord]) -> Figure:
    """Norm of a row against how often its token occurs; ids that never occur on their own at the left."""
    figure = Figure(figsize=(9.6, 3.6))
    unseen, axes = figure.subplots(1, 2, sharey=True, width_ratios=(1, 7))
    for i, record in enumerate(records):
        counts, norms = record.arrays["token_counts"], record.arrays["row_norms"]
        never = norms[counts == 0]
        if len(never):
            low, middle, high = np.quantile(never, (0.1, 0.5, 0.9))
            spread = [[middle - low], [high - middle]]
            unseen.errorbar(i, middle, spread, color=colour(i), marker=marker(i), markersize=6, capsize=3.5)
        centres, bands = _quantiles_by_count(counts[counts > 0], norms[counts > 0])
        axes.fill_between(centres, bands[:, 0], bands[:, 2], color=colour(i), alpha=0.17, linewidth=0)
        axes.plot(centres, bands[:, 1], color=colour(i), marker=marker(i), markersize=4)
    unseen.set_xlim(-0.8, len(records) - 0.2)
    unseen.set_xticks([])
    unseen.set_xlabel("never seen")
    unseen.set_ylabel("norm of the row")
    unseen.set_ylim(bottom=0)
    axes.set_xscale("log")
    compact_ticks(axes.xaxis)
    axes.set_xlabel("occurrences of the token in the training data (log scale)")
    axes.set_title("Norm of a token's row: median, band from the 10th to the 90th percentile")
    run_legend(figure, records)
    return figure


@styled
def projection_figure(records: Sequence[RunRecord]) -> Figure:
    """All rows on their two strongest directions, one panel a run, in units of the run's mean row norm."""
    columns = min(len(records), 3)
    lines = math.ceil(len(records) / columns)
    clouds = [record.arrays["projection"] / max(float(record.arrays["row_norms"].mean()), 1e-30) for record in records]
    limits = _limits(clouds)
    shape = (limits[1][1] - limits[1][0]) / (limits[0][1] - limits[0][0])
    figure = Figure(figsize=(9.6, 0.5 + lines * (0.5 + min(shape, 1.5) * 7.8 / columns)))
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat
    most = max(2.0, *(float(record.arrays["token_counts"].max()) for record in records))
    norm = LogNorm(1, most)
    for i, (record, cloud, axes) in enumerate(zip(records, clouds, panels, strict=False)):
        counts = record.arrays["token_counts"]
        order = np.random.default_rng(0).permutation(len(counts))[:MOST_POINTS]  # no group is drawn over another
        seen, never = order[counts[order] > 0], order[counts[order] == 0]
        axes.scatter(*cloud[never].T, s=4, color="#c4c4c4", linewidths=0, rasterized=True)
        axes.scatter(*cloud[seen].T, s=5, c=counts[seen], cmap="plasma", norm=norm, linewidths=0, alpha=0.75)
        axes.axhline(0, color=FAINT, linewidth=0.7, zorder=1)
        axes.axvline(0, color=FAINT, linewidth=0.7, zorder=1)
        axes.plot(0, 0, marker="+", color="black", markersize=13, markeredgewidth=2.0, zorder=5)
        axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(short(record.name, 30), color=colour(i))
        axes.set_xlabel("first direction (mean row norms)" if i + columns >= len(records) else "")
        axes.set_ylabel("second direction (mean row norms)" if i % columns == 0 else "")
        axes.tick_params(labelbottom=i + columns >= len(records))
    for axes in panels:  # places of the grid without a run
        axes.remove()
    bar = figure.colorbar(ScalarMappable(norm, "plasma"), ax=figure.axes, pad=0.02, aspect=28)
    bar.set_label("occurrences in training (grey: none)")
    bar.outline.set_visible(False)
    compact_ticks(bar.ax.yaxis)
    return figure


@dataclass(frozen=True)
class FigureOfReport:
    """name: of the PNG file; wide: over the whole page; caption: what to look for."""

    name: str
    draw: Callable[[Sequence[RunRecord]], Figure]
    wide: bool
    caption: str


FIGURES = (
    FigureOfReport(
        "training", training_figure, True,
        "Left: training loss (smoothed; as logged in the background) with validation. The first steps lie above the "
        "frame. Right: the two ends of the vocabulary. Frequent tokens are learnt early; look at how far above them "
        "the line of rare tokens stays, and whether it still falls at the end.",
    ),
    FigureOfReport(
        "geometry", geometry_figure, True,
        "When the embedding degenerates, isotropy falls towards 0 and the mean cosine rises towards 1. "
        "Look at when that starts and where it settles.",
    ),
    FigureOfReport(
        "projection", projection_figure, True,
        "Every row of the output embedding on its two strongest directions, with the same limits in all panels. "
        "The cross marks the origin. A round cloud lies around the origin with all colours mixed; a cloud beside it is "
        "the narrow cone, and where the dark (rare) points lie together, the model can hardly tell rare tokens apart.",
    ),
    FigureOfReport(
        "spectrum", spectrum_figure, False,
        "A flat line uses all directions alike. A cliff after the first value means that one common direction "
        "holds the embedding.",
    ),
    FigureOfReport(
        "cosines", cosine_figure, False,
        "In a round cloud two rows are nearly orthogonal: a narrow peak at 0. "
        "A peak to the right of 0 is the narrow cone.",
    ),
    FigureOfReport(
        "norms", norm_figure, True,
        "How norms depend on frequency. Where rare or never seen tokens differ from the others as a group, "
        "the embedding holds frequency rather than meaning.",
    ),
)  # fmt: skip


def _smooth(values: Floats) -> Floats:
    """Centred moving average, narrower towards both ends: a falling curve is not shifted to the right."""
    place = np.arange(len(values))
    reach = np.minimum(math.ceil(SMOOTHING * len(values)), np.minimum(place, place[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    smooth: Floats = (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)
    return smooth


def _log_axis(axes: Axes, what: str) -> None:
    if not axes.dataLim.width and not axes.dataLim.height:
        not_measured(axes, what)
        return
    axes.set_yscale("log")
    compact_ticks(axes.yaxis)


def _quantiles_by_count(counts: npt.NDArray[np.int64], norms: Floats) -> tuple[Floats, Floats]:
    """Bins of equal width in log n: geometric mean of the counts [b], and the 0.1, 0.5, 0.9 quantiles [b, 3]."""
    if not len(counts):
        return np.empty(0), np.empty((0, 3))
    logs = np.log(counts)
    place = np.floor(FREQUENCY_BINS * logs / max(logs.max() * (1 + 1e-9), 1e-9)).astype(int)
    used = [place == i for i in range(FREQUENCY_BINS) if (place == i).sum() >= 3]
    if not used:
        used = [np.ones(len(counts), dtype=bool)]
    centres = np.array([np.exp(logs[members].mean()) for members in used])
    return centres, np.array([np.quantile(norms[members], (0.1, 0.5, 0.9)) for members in used])


def _limits(clouds: Sequence[Floats]) -> list[tuple[float, float]]:
    """Of both axes: all clouds but their outermost thousandth, the origin, and a margin; never a thin strip."""
    limits = []
    for axis in (0, 1):
        ends = [np.quantile(cloud[:, axis], (0.001, 0.999)) for cloud in clouds]
        low, high = min(0.0, *(end[0] for end in ends)), max(0.0, *(end[1] for end in ends))
        margin = 0.06 * (high - low) + 1e-9
        limits.append((low - margin, high + margin))
    (left, right), (low, high) = limits
    missing = max(0.0, 0.55 * (right - left) - (high - low)) / 2
    return [(left, right), (low - missing, high + missing)]
