"""Figures of the evaluated output embedding. Each takes any number of methods and returns a matplotlib Figure.

Letters: V vocabulary, D hidden size, s singular values, n occurrences of a token in the training data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    method_legend,
    not_measured,
    short,
    styled,
)
from pretrain.report.methods import Method
from pretrain.report.run_records import Floats, RunRecord

MOST_POINTS = 20_000  # drawn of one run's projection
FREQUENCY_BINS = 12
MOST_COLUMNS = 3  # of panels of the projection; 4 from seven methods on


@styled
def spectrum_figure(methods: Sequence[Method]) -> Figure:
    """Singular values over the first one, both axes logarithmic; mean over seeds."""
    figure = Figure(figsize=(4.8, 3.7))
    axes = figure.subplots()
    longest = 1
    for i, method in enumerate(methods):
        found = [record.arrays["singular_values"] for record in _with(method, "singular_values")]
        if not found:
            continue
        share = np.mean([values / max(values[0], 1e-300) for values in found], axis=0)
        share = share[share > 1e-7]
        axes.plot(np.arange(1, len(share) + 1), share, color=colour(i), marker=marker(i), markersize=4,
                  markevery=slice(8))  # fmt: skip
        longest = max(longest, len(found[0]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(0.93, longest * 1.08)
    axes.set_title("Singular values of the embedding")
    axes.set_xlabel("place of the singular value")
    axes.set_ylabel("share of the first, s / s₁ (log scale)")
    if axes.lines:
        compact_ticks(axes.xaxis)
        compact_ticks(axes.yaxis)
    else:
        not_measured(axes, "singular values")
    method_legend(figure, methods)
    return figure


@styled
def cosine_figure(methods: Sequence[Method]) -> Figure:
    """Distribution of the cosine of two rows, of all seeds of a method together."""
    figure = Figure(figsize=(4.8, 3.7))
    axes = figure.subplots()
    low, high = 0.0, 0.0
    for i, method in enumerate(methods):
        found = _with(method, "cosine_edges", "cosine_counts")
        if not found:
            continue
        edges = found[0].arrays["cosine_edges"]
        counts = np.sum([record.arrays["cosine_counts"] for record in found], axis=0)
        density = counts / (max(counts.sum(), 1) * np.diff(edges))
        axes.stairs(density, edges, color=colour(i), linewidth=1.5)
        axes.stairs(density, edges, color=colour(i), alpha=0.16, fill=True)
        means = [mean for record in method.records if (mean := record.number("mean_cosine")) is not None]
        axes.plot(np.mean(means or [math.nan]), -0.035, marker="^", color=colour(i), markersize=6, clip_on=False,
                  transform=axes.get_xaxis_transform())  # fmt: skip
        used = np.flatnonzero(density > 2e-3 * density.max())
        low, high = min(low, edges[used[0]]), max(high, edges[used[-1] + 1])
    if high == low:
        not_measured(axes, "cosines of rows")
        low, high = -1, 1
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_xlim(max(-1, low - 0.08), min(1, high + 0.08))
    axes.set_ylim(bottom=0)
    axes.tick_params(axis="x", pad=7)
    axes.set_title("Cosine of two rows, triangles at the mean")
    axes.set_xlabel("cosine")
    axes.set_ylabel("density")
    method_legend(figure, methods)
    return figure


@styled
def norm_figure(methods: Sequence[Method]) -> Figure:
    """Norm of a row against how often its token occurs; ids that never occur on their own at the left."""
    figure = Figure(figsize=(9.6, 3.6))
    unseen, axes = figure.subplots(1, 2, sharey=True, width_ratios=(1, 7))
    for i, method in enumerate(methods):
        found = _with(method, "token_counts", "row_norms")
        if not found:
            continue
        counts, norms = (
            np.concatenate([record.arrays[key] for record in found]) for key in ("token_counts", "row_norms")
        )
        never = norms[counts == 0]
        if len(never):
            low, middle, high = np.quantile(never, (0.1, 0.5, 0.9))
            spread = [[middle - low], [high - middle]]
            unseen.errorbar(i, middle, spread, color=colour(i), marker=marker(i), markersize=6, capsize=3.5)
        centres, bands = _quantiles_by_count(counts[counts > 0], norms[counts > 0])
        axes.fill_between(centres, bands[:, 0], bands[:, 2], color=colour(i), alpha=0.17, linewidth=0)
        axes.plot(centres, bands[:, 1], color=colour(i), marker=marker(i), markersize=4)
    unseen.set_xlim(-0.8, len(methods) - 0.2)
    unseen.set_xticks([])
    unseen.set_xlabel("never seen")
    unseen.set_ylabel("norm of the row")
    unseen.set_ylim(bottom=0)
    axes.set_xscale("log")
    if axes.lines:
        compact_ticks(axes.xaxis)
    else:
        not_measured(axes, "norms of rows")
    axes.set_xlabel("occurrences of the token in the training data (log scale)")
    axes.set_title("Norm of a token's row: median, band from the 10th to the 90th percentile")
    method_legend(figure, methods)
    return figure


@styled
def projection_figure(methods: Sequence[Method]) -> Figure:
    """All rows on their two strongest directions, one panel a method, in units of the run's mean row norm."""
    shown = [(i, method, record) for i, method in enumerate(methods) for record in _projected(method)[:1]]
    if not shown:
        figure = Figure(figsize=(9.6, 2.4))
        not_measured(figure.subplots(), "projections of rows")
        return figure
    columns = min(len(shown), MOST_COLUMNS + (len(shown) > 6))
    lines = math.ceil(len(shown) / columns)
    arrays = [record.arrays for _, _, record in shown]
    clouds = [entry["projection"] / max(float(entry["row_norms"].mean()), 1e-30) for entry in arrays]
    limits = _limits(clouds)
    shape = (limits[1][1] - limits[1][0]) / (limits[0][1] - limits[0][0])
    figure = Figure(figsize=(9.6, 0.5 + lines * (0.5 + min(shape, 1.5) * 7.8 / columns)))
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat
    norm = LogNorm(1, max(2.0, *(float(entry["token_counts"].max()) for entry in arrays)))
    for place, ((i, method, record), cloud, axes) in enumerate(zip(shown, clouds, panels, strict=False)):
        _draw_cloud(axes, cloud, record.arrays["token_counts"], norm)
        axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")
        seed = f", seed {record.seed}" if len(method.records) > 1 else ""
        axes.set_title(short(method.name, 30 - 6 * (columns > 3)) + seed, color=colour(i))
        axes.set_xlabel("first direction (mean row norms)" if place + columns >= len(shown) else "")
        axes.set_ylabel("second direction (mean row norms)" if place % columns == 0 else "")
        axes.tick_params(labelbottom=place + columns >= len(shown))
    for axes in panels:  # places of the grid without a run
        axes.remove()
    bar = figure.colorbar(ScalarMappable(norm, "plasma"), ax=figure.axes, pad=0.02, aspect=28)
    bar.set_label("occurrences in training (grey: none)")
    bar.outline.set_visible(False)
    compact_ticks(bar.ax.yaxis)
    return figure


def _draw_cloud(axes: Axes, cloud: Floats, counts: npt.NDArray[np.int64], norm: LogNorm) -> None:
    order = np.random.default_rng(0).permutation(len(counts))[:MOST_POINTS]  # no group is drawn over another
    seen, never = order[counts[order] > 0], order[counts[order] == 0]
    axes.scatter(cloud[never, 0], cloud[never, 1], s=4, color="#c4c4c4", linewidths=0, rasterized=True)
    axes.scatter(
        cloud[seen, 0], cloud[seen, 1], s=5, c=counts[seen], cmap="plasma", norm=norm, linewidths=0, alpha=0.75
    )
    axes.axhline(0, color=FAINT, linewidth=0.7, zorder=1)
    axes.axvline(0, color=FAINT, linewidth=0.7, zorder=1)
    axes.plot(0, 0, marker="+", color="black", markersize=13, markeredgewidth=2.0, zorder=5)
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _with(method: Method, *arrays: str) -> list[RunRecord]:
    """The runs of a method that have these arrays; a Hugging Face folder may lack some."""
    return [record for record in method.records if all(name in record.arrays for name in arrays)]


def _projected(method: Method) -> list[RunRecord]:
    return _with(method, "projection", "row_norms", "token_counts")


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
