"""The numbers of a report as tidy CSV, for other tools."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.files import write_text
from pretrain.report.catalogue import measures
from pretrain.report.methods import Method

METHOD_COLUMNS = (
    "method", "measure", "section", "label", "better", "mean", "low", "high", "seeds", "human_text",
    "baseline", "difference", "difference_low", "difference_high", "difference_unit", "paired_seeds",
)  # fmt: skip
RUN_COLUMNS = ("method", "run", "seed", "folder", "measure", "section", "label", "value")


def write_csv(methods: Sequence[Method], page: Path) -> None:
    """Beside ``page``, with its name: NAME.csv, one row a method and measure; NAME_runs.csv, one a run and measure.

    ``low`` and ``high`` are the ends of 95 % t intervals over seeds, empty below two seeds. ``difference`` is to
    the first method over the seeds in common, in ``difference_unit``: percent (of the geometric mean) or absolute.
    ``human_text`` is of the text that the method was evaluated on.
    """
    write_text(page.with_suffix(".csv"), _text(METHOD_COLUMNS, _method_rows(methods)))
    write_text(page.with_name(f"{page.stem}_runs.csv"), _text(RUN_COLUMNS, _run_rows(methods)))


def _method_rows(methods: Sequence[Method]) -> list[list[Any]]:
    rows = []
    for method in methods:
        for row in measures(methods):
            found = row.of(method)
            if found is None:
                continue
            line = [method.name, row.name, row.section, row.label, row.better, found.mean, found.low, found.high]
            line += [found.count, row.human_value([method])]
            paired = None if method is methods[0] else row.paired(method, methods[0])
            if paired is None:
                rows.append([*line, *[None] * 6])
            else:
                unit = "percent" if row.by_log else "absolute"
                line += [methods[0].name, paired.mean, paired.low, paired.high, unit, paired.count]
                rows.append(line)
    return rows


def _run_rows(methods: Sequence[Method]) -> list[list[Any]]:
    return [
        [method.name, record.name, record.seed, record.folder, row.name, row.section, row.label, value]
        for method in methods
        for record in method.records
        for row in measures(methods)
        if (value := row.of_run(record)) is not None
    ]


def _text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    stored = io.StringIO()
    csv.writer(stored, lineterminator="\n").writerows([columns, *rows])
    return stored.getvalue()
