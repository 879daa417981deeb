"""The figures of a study's report, each a matplotlib Figure in the look of the reports of runs.

Letters: D hidden size, s singular values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pretrain.files import replacing
from pretrain.report.figure_style import (
    DOTS_PER_INCH,
    FAINT,
    INK,
    STYLE,
    colour,
    compact_ticks,
    marker,
    save_png,
    short,
)
from pretrain.study.fit_forms import Floats
from pretrain.study.fit_words import SCALES, SYMBOLS, size_text
from pretrain.study.fits import Fit, Interval
from pretrain.study.study_cells import (
    ISOTROPY,
    LOSS,
    MEAN_SHIFT,
    RARE_LOSS,
    Row,
    Series,
    Study,
    cells,
    mean_interval,
    paired,
    partner,
)

PANELS = (LOSS, RARE_LOSS, ISOTROPY, MEAN_SHIFT)
BEYOND = 1 / 3  # of the range of the scale on a logarithmic axis: how far a fit is drawn past the largest
Drawn = ParamSpec("Drawn")
SPECTRA_SHOWN = 4
MOST_BESIDE = 6  # columns of a heat map that three panels beside each other have room for


def styled(draw: Callable[Drawn, Figure]) -> Callable[Drawn, Figure]:
    """Draw in the style of all figures; what the process has set for its own is left as it was."""

    @functools.wraps(draw)
    def wrapper(*args: Drawn.args, **kwargs: Drawn.kwargs) -> Figure:
        with matplotlib.rc_context({"figure.dpi": DOTS_PER_INCH, **STYLE}):
            figure = draw(*args, **kwargs)
            FigureCanvasAgg(figure).draw()  # ticks are made when drawn: make them in this style
        return figure

    return wrapper


@dataclass(frozen=True)
class Picture:
    """Attributes: name: of its files; caption: what is drawn; figure."""

    name: str
    caption: str
    figure: Figure

    def save(self, folder: Path) -> Path:
        """NAME.png and NAME.pdf in ``folder``; the path of the first."""
        path = folder / f"{self.name}.png"
        save_png(self.figure, path)
        with replacing(path.with_suffix(".pdf")) as temporary, matplotlib.rc_context({"pdf.fonttype": 42}):
            self.figure.savefig(temporary, format="pdf", facecolor="white", metadata={"CreationDate": None})
        return path


@styled
def scale_figure(study: Study, fits: Mapping[tuple[str, str], Fit]) -> Figure:
    """Four measures against the scale: seeds, means with intervals, and what was fitted.

    Args:
        fits: by (label of the series, column of the measure), against ``study.scale``.
    """
    figure = Figure(figsize=(9.6, 7.0))
    for axes, measure in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for i, series in enumerate(study.series):
            drawn = cells(series.rows, measure, study.scale)
            _points(axes, drawn, i, _shift(study, i, len(study.series)))
            if (series.label, measure.column) in fits:
                _curve(axes, fits[series.label, measure.column], i)
        axes.set_title(measure.label[:1].upper() + measure.label[1:])
        axes.set_ylabel("nats per token" if measure.logarithm else measure.label)
        _scale_axis(axes, study)
    _legend(figure, study.series)
    return figure


@styled
def difference_figure(study: Study) -> Figure:
    """What a method changes at each scale: paired differences with intervals, zero being no change."""
    figure = Figure(figsize=(9.6, 7.0))
    compared = [(i, series, base) for i, series in enumerate(study.series) if (base := partner(study, series))]
    for axes, measure in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        axes.axhline(0, color=INK, linewidth=1.0)
        for place, (i, series, base) in enumerate(compared):
            _points(axes, paired(series, base, measure, study.scale), i, _shift(study, place, len(compared)), line=True)
        axes.set_title(f"{measure.label[:1].upper()}{measure.label[1:]}: {measure.better} is better")
        axes.set_ylabel(f"difference from {short(study.baseline, 24)}")
        _scale_axis(axes, study)
    _legend(figure, [series for _, series, _ in compared], [i for i, _, _ in compared])
    return figure


@dataclass(frozen=True)
class HeatMap:
    """Runs over two axes: ``places`` has the runs of each (down, across), all that differ only by seed."""

    across: str
    columns: Sequence[str]
    rows: Sequence[str]
    places: Mapping[tuple[int, int], Sequence[Row]]


def heat_map(study: Study) -> HeatMap | None:
    """Over the scale and the series; at one scale over the last axis that varies and the others. None without two."""
    scales = sorted({float(row[study.scale]) for row in study.rows})
    if len(scales) > 1 and len(study.series) > 1:
        places: dict[tuple[int, int], list[Row]] = {}
        for i, series in enumerate(study.series):
            for row in series.rows:
                places.setdefault((i, scales.index(float(row[study.scale]))), []).append(row)
        labels = [short(series.label, 30) for series in study.series]
        return HeatMap(SYMBOLS[study.scale], [size_text(scale) for scale in scales], labels, places)
    axes = [name for name in study.axes if name != "seed"]
    if len(scales) > 1 or len(axes) < 2:
        return None
    *down, across = axes
    columns = study.axes[across]
    rows = list(dict.fromkeys(tuple(row.get(f"axis.{name}") for name in down) for row in study.rows))
    places = {}
    for row in study.rows:
        if row.get(f"axis.{across}") is not None:
            place = rows.index(tuple(row.get(f"axis.{name}") for name in down)), columns.index(row[f"axis.{across}"])
            places.setdefault(place, []).append(row)
    labels = [short(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in zip(down, key, strict=True)), 30)
              for key in rows]  # fmt: skip
    return HeatMap(across.replace("_", " "), [str(value) for value in columns], labels, places)


@styled
def heat_map_figure(shape: HeatMap) -> Figure:
    """Means over seeds; where the columns are many, one panel below the other."""
    stacked = len(shape.columns) > MOST_BESIDE
    height = 0.42 * len(shape.rows)
    figure = Figure(figsize=(9.6, 3 * (1.0 + height) if stacked else 1.6 + height))
    panels = figure.subplots(3, 1, sharex=True) if stacked else figure.subplots(1, 3, sharey=True)
    for axes, measure in zip(panels, (RARE_LOSS, LOSS, ISOTROPY), strict=True):
        grid = np.full((len(shape.rows), len(shape.columns)), np.nan)
        for place, rows in shape.places.items():
            values = [value for row in rows if math.isfinite(value := measure.value(row))]
            grid[place] = np.mean(values) if values else np.nan
        # pale enough that dark numbers can be read on every colour
        low, high = (np.nanmin(grid), np.nanmax(grid)) if np.isfinite(grid).any() else (0.0, 1.0)
        colours = "Blues" if measure.better == "higher" else "Oranges"
        axes.imshow(grid, aspect="auto", cmap=colours, vmin=low, vmax=low + (high - low) * 1.8 + 1e-9)
        for row, column in zip(*np.nonzero(np.isfinite(grid)), strict=True):
            axes.text(column, row, f"{grid[row, column]:#.3g}".rstrip("."), ha="center", va="center", fontsize=8.5)
        axes.set_title(measure.label[:1].upper() + measure.label[1:])
        axes.set_xticks(range(len(shape.columns)), shape.columns)
        axes.set_yticks(range(len(shape.rows)), shape.rows)
        axes.set_xlabel(shape.across)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return figure


@styled
def spectrum_figure(study: Study, spectra: Mapping[str, Floats]) -> Figure:
    """Singular values of the output embedding over the first one, a panel for each method, a colour for each scale.

    Args:
        spectra: run -> s [D], falling.
    """
    shown = [series for series in study.series if any(row["run"] in spectra for row in series.rows)][:SPECTRA_SHOWN]
    figure = Figure(figsize=(9.6, 3.7))
    panels = figure.subplots(1, len(shown), sharex=True, sharey=True, squeeze=False)[0]
    scales = sorted({float(row[study.scale]) for row in study.rows})
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(scales)))
    for axes, series in zip(panels, shown, strict=True):
        for row in series.rows:
            if (values := spectra.get(row["run"])) is None or not values[0] > 0:
                continue
            place = (np.arange(len(values)) + 1) / len(values)
            kept = values > 1e-7 * values[0]
            axes.plot(place[kept], values[kept] / values[0], color=shades[scales.index(float(row[study.scale]))],
                      linewidth=1.3, alpha=0.85)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(short(series.label, 90 // len(shown)))
        axes.set_xlabel("place of the singular value / hidden size")
        compact_ticks(axes.xaxis)
        compact_ticks(axes.yaxis)
    panels[0].set_ylabel("share of the first, s / s₁")
    handles = [Line2D([], [], color=shade, linewidth=3.0) for shade in shades]
    names = [f"{SYMBOLS.get(study.scale, '')} = {size_text(scale)}" for scale in scales]
    figure.legend(handles, names, loc="outside upper left", ncols=min(len(scales), 6), handlelength=1.4)
    return figure


def beyond(fit: Fit) -> Floats:
    """Scales at which a fit is drawn [n]: the range of the data, and past it only where a dependence was found."""
    low, high = math.log(fit.scales[0]), math.log(fit.scales[-1])
    return np.exp(np.linspace(low, high + (BEYOND * (high - low) if fit.depends else 0.0), 120))


def _curve(axes: Axes, fit: Fit, place: int) -> None:
    """Solid over the data, dashed past them, each with its band; nothing where nothing may be claimed."""
    if not fit.curves or fit.verdict == "scattered":
        return
    x = beyond(fit)
    value, low, high = fit.band(x)
    inside = x <= fit.scales[-1] * (1 + 1e-9)
    axes.plot(x[inside], value[inside], color=colour(place), linewidth=1.5, zorder=2)
    axes.plot(x[~inside], value[~inside], color=colour(place), linewidth=1.3, linestyle=(0, (4, 2.5)), zorder=2)
    axes.fill_between(x, low, high, color=colour(place), alpha=0.13, linewidth=0, zorder=1)


def _points(axes: Axes, found: Mapping[float, Sequence[float]], place: int, shift: float, line: bool = False) -> None:
    """Seeds as small dots, their mean as a marker with its interval."""
    means: list[tuple[float, Interval]] = []
    for scale, values in found.items():
        x = scale * shift
        axes.plot(
            [x] * len(values), values, linestyle="none", marker=".", markersize=4, color=colour(place), alpha=0.45
        )
        if (interval := mean_interval(values)) is not None:
            means.append((x, interval))
    for x, interval in means:
        if math.isfinite(interval.low):
            axes.plot([x, x], [interval.low, interval.high], color=colour(place), linewidth=1.1, zorder=3)
    axes.plot(*zip(*((x, interval.value) for x, interval in means), strict=True) if means else ([], []),
              color=colour(place), linestyle="-" if line else "none", linewidth=1.2, marker=marker(place),
              markersize=5.5, markeredgecolor="white", markeredgewidth=0.7, zorder=4)  # fmt: skip


def _shift(study: Study, place: int, count: int) -> float:
    """A factor that keeps the markers of several series at one scale from covering each other."""
    scales = [float(row[study.scale]) for row in study.rows]
    return float((max(scales) / min(scales)) ** (0.008 * (place - (count - 1) / 2)))


def _scale_name(column: str) -> str:
    name = SCALES.get(column, column)
    return f"{name} {SYMBOLS[column]}" if column in SYMBOLS else name


def _scale_axis(axes: Axes, study: Study) -> None:
    """Logarithmic, with ticks where the runs are."""
    axes.set_xscale("log")
    scales = sorted({float(row[study.scale]) for row in study.rows})
    apart = [scales[0]]
    for scale in scales[1:]:
        if scale > apart[-1] * (scales[-1] / scales[0]) ** 0.08:
            apart.append(scale)
    axes.xaxis.set_major_locator(FixedLocator(apart))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
    axes.set_xlabel(_scale_name(study.scale))
    if not axes.dataLim.height and not len(axes.lines):
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=FAINT)


def _legend(figure: Figure, series: Sequence[Series], places: Sequence[int] | None = None) -> None:
    """Above all panels, where it covers nothing."""
    handles = [
        Line2D([], [], color=colour(i), marker=marker(i), markersize=5.5, linewidth=1.5)
        for i in (places or range(len(series)))
    ]
    names = [short(one.label) for one in series]
    columns = max(1, min(len(names), int(figure.get_figwidth() * 11 / (max(map(len, names)) + 6))))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=1.8, columnspacing=1.8)
