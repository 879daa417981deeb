"""The numbers as rows of cells, for the page and for the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.evaluation.evaluation_file import look_up
from pretrain.report.catalogue import measures
from pretrain.report.figure_style import short
from pretrain.report.measures import Measure, uneven
from pretrain.report.methods import Method

TERMINAL_WIDTH = 100
TERMINAL_ROWS = (
    "perplexity", "unique_tokens", ("isotropy",), ("seen_rows", "isotropy"), ("mean_cosine",),
    ("training", "tokens_per_second"),
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One method's number.

    Attributes:
        interval: 95 %, over seeds or, of a single run, as the evaluation measured it; empty: there is none.
        change: from the first method; ``shown``: by an interval that excludes zero.
        note: how many seeds, where some lack the number.
    """

    text: str
    best: bool
    interval: str = ""
    change: str = ""
    shown: bool = False
    note: str = ""


@dataclass(frozen=True)
class Row:
    label: str
    arrow: str
    cells: list[Cell]
    human: str


@dataclass(frozen=True)
class Section:
    name: str
    rows: list[Row]


def sections(methods: Sequence[Method]) -> list[Section]:
    """All rows by section; cells in the order of the methods."""
    return [
        Section(name, [_row(row, methods) for row in rows])
        for name, rows in itertools.groupby(measures(methods), key=lambda row: row.section)
    ]


def _row(row: Measure, methods: Sequence[Method]) -> Row:
    best = row.best(methods)
    cells = [_cell(row, method, methods[0], best=i in best) for i, method in enumerate(methods)]
    return Row(row.label, row.arrow, cells, _human(row, methods))


def _human(row: Measure, methods: Sequence[Method]) -> str:
    """The number of the human text; empty where there is none."""
    human = row.human_value(methods)
    return "" if human is None else row.show(human)


def _cell(row: Measure, method: Method, first: Method, *, best: bool) -> Cell:
    interval = _measured_interval(row, method) if len(method.records) == 1 else row.interval_text(row.of(method))
    change, shown = "", False
    if method is not first:
        paired = row.paired(method, first)
        if len(method.records) == len(first.records) == 1:
            change = row.change(method, first)
        elif paired is not None:
            change, shown = row.paired_text(paired), paired.excludes_zero and row.better is not None
    return Cell(row.text(method), best, interval, change, shown, uneven(method, row))


def _measured_interval(row: Measure, method: Method) -> str:
    """Of a correlation of one run: over its word pairs."""
    if row.path[-1] != "spearman":
        return ""
    ends = look_up(method.first.evaluation, (*row.path[:-1], "interval"))
    if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(end, (int, float)) for end in ends):
        return ""
    return f"[{row.text_of(ends[0])}, {row.text_of(ends[1])}]"


def summary_table(methods: Sequence[Method]) -> str:
    """The main numbers as text, one column a method, at most :data:`TERMINAL_WIDTH` wide.

    Methods that do not fit beside each other follow below.
    """
    rows = [row for row in measures(methods) if row.path in TERMINAL_ROWS or row.path[0] in TERMINAL_ROWS]
    labels = [f"{_terminal_label(row)} {row.arrow}" for row in rows]
    label_width = max(map(len, labels))
    texts = [[_terminal_cell(row, method) for method in methods] for row in rows]
    widest = max(len(text) for line in texts for text in line)
    column = max(10, widest, min(24, max(len(method.name) for method in methods)))
    human = [_human(row, methods) for row in rows]
    human_width = len("human text")
    room = TERMINAL_WIDTH - label_width - human_width - 2
    per_block = max(1, room // (column + 2))
    lines: list[str] = []
    for first in range(0, len(methods), per_block):
        block = slice(first, first + per_block)
        head = "".join(f"  {short(method.name, column):>{column}}" for method in methods[block])
        width = label_width + len(head) + 2 + human_width
        lines += [""] if lines else []
        lines += [f"{'':{label_width}}{head}  {'human text':>{human_width}}", "-" * width]
        for label, cells, text in zip(labels, texts, human, strict=True):
            shown = "".join(f"  {cell:>{column}}" for cell in cells[block])
            lines.append(f"{label:{label_width}}{shown}  {text:>{human_width}}".rstrip())
    return "\n".join(lines)


def _terminal_cell(row: Measure, method: Method) -> str:
    return f"{row.text(method)} {row.interval_text(row.of(method))}".rstrip()


def _terminal_label(row: Measure) -> str:
    if row.path[0] in ("perplexity", "unique_tokens"):
        return f"{'perplexity' if row.path[0] == 'perplexity' else 'distinct'}, {row.path[1]}"
    return row.label.replace("rows of ids seen in training", "seen rows")
