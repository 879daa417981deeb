"""Differences from the first method with their intervals, one panel a main measure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pretrain.report.catalogue import main_measures
from pretrain.report.figure_style import FAINT, INK, colour, marker, not_measured, short, styled
from pretrain.report.formatting import negative, tick
from pretrain.report.measures import Measure
from pretrain.report.methods import Method


def has_intervals(methods: Sequence[Method]) -> bool:
    """Whether any method has two seeds in common with the first."""
    rows = main_measures(methods)
    found = [row.paired(method, methods[0]) for row in rows for method in methods[1:]]
    return any(interval is not None and interval.low is not None for interval in found)


@styled
def difference_figure(methods: Sequence[Method]) -> Figure:
    """Mean and 95 % interval of each method's paired differences; filled where it excludes zero."""
    rows = main_measures(methods)
    figure = Figure(figsize=(9.6, 1.35 + 0.34 * (len(methods) - 1)))
    panels = figure.subplots(1, len(rows), sharey=True)
    for axes, row in zip(panels, rows, strict=True):
        _draw(axes, row, methods)
    panels[0].set_yticks(range(1, len(methods)), [short(method.name, 26) for method in methods[1:]])
    for label, place in zip(panels[0].get_yticklabels(), range(1, len(methods)), strict=True):
        label.set_color(colour(place))
        label.set_fontweight("bold")
    panels[0].set_ylim(len(methods) - 0.4, 0.4)
    return figure


def _draw(axes: Axes, row: Measure, methods: Sequence[Method]) -> None:
    axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    drawn = False
    for i, method in enumerate(methods[1:], 1):
        found = row.paired(method, methods[0])
        if found is None or found.low is None or found.high is None or not math.isfinite(found.mean):
            continue
        drawn = True
        axes.plot([found.low, found.high], [i, i], color=colour(i), linewidth=2.2, solid_capstyle="butt")
        axes.plot(found.mean, i, color=colour(i), marker=marker(i), markersize=6.5, markeredgewidth=1.4,
                  markerfacecolor=colour(i) if found.excludes_zero else "white")  # fmt: skip
    if not drawn:
        not_measured(axes, "two seeds of both")
    low, high = axes.get_xlim()
    margin = 0.08 * (high - low)
    axes.set_xlim(low - margin, high + margin)
    axes.set_title(f"{row.in_words[:1].upper()}{row.in_words[1:]}", fontsize=9.0)
    axes.set_xlabel(f"{'%' if row.by_log else 'difference'} {row.arrow}".strip(), color=FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: negative(tick(value))))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
