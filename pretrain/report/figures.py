"""Which figures a report has, in which order, and what to look for in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from pretrain.report.difference_figure import difference_figure, has_intervals
from pretrain.report.embedding_figures import cosine_figure, norm_figure, projection_figure, spectrum_figure
from pretrain.report.methods import Method
from pretrain.report.training_figures import gates_figure, geometry_figure, training_figure


@dataclass(frozen=True)
class FigureOfReport:
    """name: of the PNG file; wide: over the whole page; caption: what to look for; seeds: what is said of several."""

    name: str
    draw: Callable[[Sequence[Method]], Figure]
    wide: bool
    caption: str
    seeds: str = ""

    def caption_of(self, methods: Sequence[Method]) -> str:
        several = any(len(method.records) > 1 for method in methods)
        return f"{self.caption} {self.seeds}".strip() if several else self.caption


DIFFERENCES = FigureOfReport(
    "differences", difference_figure, True,
    "Differences from the first method, each the mean over the seeds that both have, with its 95 % interval. Filled "
    "markers: the interval excludes zero. Perplexities in percent, the others as they are; the arrow says which way "
    "is better.",
)  # fmt: skip
BAND = "Lines are means over seeds, bands reach from the lowest to the highest seed."
FIGURES = (
    FigureOfReport(
        "training", training_figure, True,
        "Left: training loss (smoothed; as logged in the background) with validation. The first steps may lie above "
        "the frame. Right: the two ends of the vocabulary. Frequent tokens are learnt early; look at how far above "
        "them the line of rare tokens stays, and whether it still falls at the end.",
        BAND,
    ),
    FigureOfReport(
        "geometry", geometry_figure, True,
        "The output embedding while training. When it degenerates, isotropy falls towards 0, mean cosine and mean "
        "shift rise towards 1, and one direction takes all: the effective rank falls, the share of the strongest "
        "direction rises. Look at when that starts and where it settles.",
        BAND,
    ),
    FigureOfReport(
        "projection", projection_figure, True,
        "Every row of the output embedding on its two strongest directions, with the same limits in all panels. "
        "The cross marks the origin. A round cloud lies around the origin with all colours mixed; a cloud beside it is "
        "the narrow cone, and where the dark (rare) points lie together, the model can hardly tell rare tokens apart.",
        "Of each method, its first seed.",
    ),
    FigureOfReport(
        "spectrum", spectrum_figure, False,
        "A flat line uses all directions alike. A cliff after the first value means that one common direction "
        "holds the embedding.",
        "Means over seeds.",
    ),
    FigureOfReport(
        "cosines", cosine_figure, False,
        "In a round cloud two rows are nearly orthogonal: a narrow peak at 0. "
        "A peak to the right of 0 is the narrow cone.",
        "All seeds of a method together.",
    ),
    FigureOfReport(
        "norms", norm_figure, True,
        "How norms depend on frequency. Where rare or never seen tokens differ from the others as a group, "
        "the embedding holds frequency rather than meaning.",
        "Rows of all seeds together.",
    ),
    FigureOfReport(
        "gates", gates_figure, True,
        "What gates did. Above: norms and gates by frequency at the last measured step; a gate of 0 lets only a row's "
        "own targets train it. Below: the share of the gradient of the logits that gates took away, of all and of what "
        "pushes rare rows, and how much of the vocabulary counted as rare. A method without gates has no such line.",
        BAND,
    ),
)  # fmt: skip


def figures_of(methods: Sequence[Method]) -> list[FigureOfReport]:
    """:data:`FIGURES`, after the differences where there are intervals of them."""
    return [DIFFERENCES, *FIGURES] if has_intervals(methods) else list(FIGURES)
