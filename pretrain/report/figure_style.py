"""One look for all figures, without matplotlib's global state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pretrain.files import replacing
from pretrain.report.formatting import tick
from pretrain.report.methods import Curve, Method

DOTS_PER_INCH = 160
INK, FAINT, GRID = "#222222", "#8a8a8a", "#e4e4e4"
# Okabe and Ito's palette, grey in the place of yellow: told apart by people with any common colour blindness. There is
# one marker more than there are colours, so that a method beyond them still looks like no other.
METHOD_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
METHOD_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LEGEND_NAME = 40  # characters
STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so figures look the same everywhere
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.labelsize": 9.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "text.parse_math": False,  # a dollar in the name of a run is a dollar
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "savefig.facecolor": "white",
}


def styled(draw: Callable[[Sequence[Method]], Figure]) -> Callable[[Sequence[Method]], Figure]:
    """Draw under :data:`STYLE`; what the process has set for its own figures is left as it was."""

    @functools.wraps(draw)
    def wrapper(methods: Sequence[Method]) -> Figure:
        with matplotlib.rc_context({"figure.dpi": DOTS_PER_INCH, **STYLE}):
            figure = draw(methods)
            FigureCanvasAgg(figure).draw()  # ticks are made when drawn: make them in this style
        return figure

    return wrapper


def colour(place: int) -> str:
    """The colour of the method at this place of the list, the same in every figure."""
    return METHOD_COLOURS[place % len(METHOD_COLOURS)]


def marker(place: int) -> str:
    return METHOD_MARKERS[place % len(METHOD_MARKERS)]


def short(name: str, length: int = LEGEND_NAME) -> str:
    """A long name by its two ends."""
    if len(name) <= length:
        return name
    return name[: length // 2 - 1] + "…" + name[len(name) - (length - length // 2) :]


def method_legend(figure: Figure, methods: Sequence[Method]) -> None:
    """Names, colours and markers above all panels, where they cover nothing."""
    handles = [
        Line2D([], [], color=colour(i), linewidth=3.0, marker=marker(i), markersize=5.5) for i in range(len(methods))
    ]
    names = [short(method.name) for method in methods]
    fitting = int(figure.get_figwidth() * 11 / (max(map(len, names)) + 6))  # about 11 characters an inch
    columns = max(1, min(len(methods), fitting))
    figure.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=columns,
        handlelength=1.8,
        columnspacing=1.8,
        borderaxespad=0.2,
    )


def draw_curve(axes: Axes, curve: Curve, place: int, linestyle: str = "-") -> None:
    """A method's mean over tokens with markers, and a band from its lowest to its highest seed."""
    if (curve.low < curve.high).any():
        axes.fill_between(curve.tokens, curve.low, curve.high, color=colour(place), alpha=0.18, linewidth=0)
    every = max(1, len(curve.tokens) // 16)
    axes.plot(curve.tokens, curve.mean, color=colour(place), linestyle=linestyle, marker=marker(place), markersize=3.5,
              markevery=every)  # fmt: skip


def token_axis(axes: Axes) -> None:
    """Trained tokens as K, M and B."""
    axes.set_xlabel("tokens trained on")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def compact_ticks(axis: Any) -> None:
    """Short numbers on an axis of any scale; on a logarithmic one of less than two decades, the minor ticks too."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() == "log" and low > 0 and high / low < 100:
        wide = high / low > 12
        axis.set_minor_formatter(
            FuncFormatter(lambda value, _: tick(value) if f"{value:e}"[0] in ("25" if wide else "23457") else "")
        )


def is_empty(axes: Axes) -> bool:
    """Whether no line on it has a point."""
    return not any(np.size(line.get_xdata()) for line in axes.lines)


def not_measured(axes: Axes, what: str) -> None:
    """An empty panel says why it is empty."""
    axes.text(0.5, 0.5, f"not measured:\n{what}", transform=axes.transAxes, ha="center", va="center", color=FAINT)


def save_png(figure: Figure, path: Path) -> None:
    """Write at :data:`DOTS_PER_INCH`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH, facecolor="white")
