"""Run folders to one self-contained HTML page with its figures, and the table for the terminal."""

from __future__ import annotations

import base64
import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pretrain.files import write_text
from pretrain.report.comparison import Measure, caveats, findings, measures
from pretrain.report.figure_style import colour, save_png, short
from pretrain.report.figures import FIGURES
from pretrain.report.formatting import ABSENT, TIMES, absent, compact, duration, grouped
from pretrain.report.run_records import RunRecord, look_up, read_runs
from pretrain.report.template import PAGE

TERMINAL_WIDTH = 100
TERMINAL_ROWS = (
    "perplexity", "unique_tokens", ("isotropy",), ("seen_rows", "isotropy"), ("mean_cosine",),
    ("training", "tokens_per_second"),
)  # fmt: skip


def write_report(run_folders: Sequence[Path], output: Path) -> Path:
    """Write the page to ``output`` and its figures as PNG files into ``figures/`` beside it.

    A page or figure is replaced as a whole; a report that fails leaves the old one in place.

    Args:
        run_folders: evaluated runs; the first is what the others are compared with.

    Returns:
        ``output``.

    Raises:
        UserError: a folder is not that of an evaluated run.
    """
    records = read_runs(run_folders)
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures = []
    for figure in FIGURES:
        path = output.parent / "figures" / f"{figure.name}.png"
        save_png(figure.draw(records), path)
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        pictures.append({"data": data, "caption": figure.caption, "wide": figure.wide})
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    html = page.render(
        title="Report: " + ", ".join(short(record.name, 60) for record in records),
        subtitle=_subtitle(records),
        findings=findings(records),
        caveats=caveats(records),
        runs=[
            {
                "name": record.name,
                "colour": colour(i),
                "recipe": record.recipe_text,
                "command_folder": shlex.quote(str(record.folder)),
            }
            for i, record in enumerate(records)
        ],
        sections=_sections(records),
        figures=pictures,
        facts=_facts(records),
    )
    write_text(output, html)
    return output


def summary_table(records: Sequence[RunRecord]) -> str:
    """The main numbers as text, one column a run, at most :data:`TERMINAL_WIDTH` wide.

    Runs that do not fit beside each other follow below.
    """
    rows = [row for row in measures(records) if row.path in TERMINAL_ROWS or row.path[0] in TERMINAL_ROWS]
    labels = [f"{_terminal_label(row)} {row.arrow}" for row in rows]
    label_width = max(map(len, labels))
    column = max(10, min(24, max(len(record.name) for record in records)))
    human = [_human_text(row, records[0]) for row in rows]
    human_width = len("human text")
    room = TERMINAL_WIDTH - label_width - human_width - 2
    per_block = max(1, room // (column + 2))
    lines: list[str] = []
    for first in range(0, len(records), per_block):
        block = records[first : first + per_block]
        head = "".join(f"  {short(record.name, column):>{column}}" for record in block)
        width = label_width + len(head) + 2 + human_width
        lines += [""] if lines else []
        lines += [f"{'':{label_width}}{head}  {'human text':>{human_width}}", "-" * width]
        for label, row, text in zip(labels, rows, human, strict=True):
            cells = "".join(f"  {row.text(record):>{column}}" for record in block)
            lines.append(f"{label:{label_width}}{cells}  {text:>{human_width}}".rstrip())
    return "\n".join(lines)


def _terminal_label(row: Measure) -> str:
    if row.path[0] in ("perplexity", "unique_tokens"):
        return f"{'perplexity' if row.path[0] == 'perplexity' else 'distinct'}, {row.path[1]}"
    return row.label.replace("rows of ids seen in training", "seen rows")


def _human_text(row: Measure, record: RunRecord) -> str:
    """Distinct ids in the evaluated text, beside the distinct ids predicted."""
    if row.path[0] != "unique_tokens":
        return ""
    return absent(look_up(record.evaluation, ("unique_targets", row.path[1])), grouped)


def _sections(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    sections = []
    for name, rows in itertools.groupby(measures(records), key=lambda row: row.section):
        shown = []
        for row in rows:
            best = row.best(records)
            cells = [
                {"text": row.text(record), "best": i in best, "change": row.change(record, records[0])}
                for i, record in enumerate(records)
            ]
            shown.append(
                {"label": row.label, "arrow": row.arrow, "cells": cells, "human": _human_text(row, records[0])}
            )
        sections.append({"name": name, "rows": shown})
    return sections


def _subtitle(records: Sequence[RunRecord]) -> str:
    runs = "1 run" if len(records) == 1 else f"{len(records)} runs"
    splits = ", ".join(sorted({str(record.evaluation["split"]) for record in records}))
    targets = sorted({look_up(record.evaluation, ("target_tokens", "total")) or 0 for record in records})
    return f"{runs}, evaluated on {' and '.join(map(grouped, targets))} tokens of the {splits} split."


def _facts(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Label and one text for each run; rows that say nothing for any run are left out."""
    columns = [_facts_of(record) for record in records]
    rows = [(label, [column[label] for column in columns]) for label in columns[0]]
    return [(label, values) for label, values in rows if any(value != ABSENT for value in values)]


def _facts_of(record: RunRecord) -> dict[str, str]:
    evaluation, training = record.evaluation, record.evaluation["training"]

    def recipe(*path: str) -> Any:
        return look_up(record.recipe, path)

    def setting(key: str) -> Any:
        return training.get(key, "?")

    versions = training.get("versions") or {}
    tokens_per_step = (recipe("batch", "global_batch_size") or 0) * (recipe("model", "sequence_length") or 0)
    return {
        "method": _method(record),
        "corpus": f"{recipe('data', 'folder') or ABSENT} ({recipe('data', 'corpus', 'source') or 'unknown source'})",
        "model": f"{recipe('model', 'style') or 'model'}, {recipe('model', 'num_layers')} layers {TIMES} "
        f"{recipe('model', 'hidden_size')}, {recipe('model', 'num_attention_heads')} heads, "
        f"sequences of {recipe('model', 'sequence_length')}",
        "vocabulary": f"{grouped(len(record.arrays['token_counts']))} ids, "
        f"{grouped((record.arrays['token_counts'] == 0).sum())} of them never seen in training",
        "parameters": f"{compact(evaluation['parameters'])}, "
        f"{compact(evaluation['parameters_without_embeddings'])} without embeddings",
        "trained on": f"{compact(evaluation['tokens'])} tokens, {grouped(evaluation['checkpoint_step'])} steps"
        + (f" of {grouped(tokens_per_step)}" if tokens_per_step else ""),
        "layout": f"{setting('world_size')} ranks: tensor parallel {setting('tensor_model_parallel_size')} {TIMES} "
        f"data parallel {setting('data_parallel_size')}, {setting('sharding')}, {setting('precision')}",
        "hardware": str(training.get("hardware") or ABSENT),
        "time": absent(training.get("seconds"), duration),
        "seed": str(ABSENT if recipe("seed") is None else recipe("seed")),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or ABSENT,
        "folder": str(record.folder),
    }


def _method(record: RunRecord) -> str:
    name = str(record.evaluation["method"])
    objective = look_up(record.recipe, ("objective",))
    if name != "agg" or not isinstance(objective, dict):
        return {"mle": "plain cross-entropy (mle)"}.get(name, name)
    window, fraction = objective.get("window_steps"), objective.get("rare_fraction")
    rare = f"alpha {objective.get('alpha') or 0.03}" if fraction is None else f"rare fraction {fraction}"
    return (
        f"adaptive gradient gating (agg): {rare}, counted over "
        f"{'one epoch' if window is None else f'{window} steps'}, never-seen ids: {objective.get('never_seen')}"
    )
