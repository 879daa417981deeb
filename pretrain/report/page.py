"""Run folders to one self-contained HTML page, with its figures and numbers as files beside it."""

from __future__ import annotations

import base64
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pretrain.errors import UserError
from pretrain.evaluation.evaluation_file import look_up
from pretrain.files import make_folder, write_text
from pretrain.report.comparison import caveats, verdicts
from pretrain.report.facts import facts
from pretrain.report.figure_style import colour, save_png, short
from pretrain.report.figures import figures_of
from pretrain.report.formatting import grouped
from pretrain.report.methods import Method, group_runs
from pretrain.report.page_style import STYLE
from pretrain.report.records_csv import write_csv
from pretrain.report.run_records import RunRecord, read_runs
from pretrain.report.samples import examples, how_generated, under_trained
from pretrain.report.table import sections
from pretrain.report.template import PAGE

MOST_COLUMNS = 5  # of methods; more of them are the rows


def write_report(run_folders: Sequence[Path], output: Path) -> list[Method]:
    """Write the page to ``output``; beside it its figures into ``figures/`` and its numbers as two CSV files.

    Each file is replaced as a whole; a report that fails leaves the old page in place.

    Args:
        run_folders: evaluated runs and Hugging Face folders; those that differ only by the seed form a method, and
            the first method is what the others are compared with.
        output: must end in ``.html``.

    Returns:
        What the report is about.

    Raises:
        UserError: a folder is not that of an evaluated run, or ``output`` cannot be a page.
    """
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise UserError(
            f"--output {output} is not a page: name a file that ends in .html; figures and CSV go beside it"
        )
    methods = group_runs(read_runs(run_folders))
    make_folder(output.parent)
    pictures = []
    for figure in figures_of(methods):
        path = output.parent / "figures" / f"{figure.name}.png"
        save_png(figure.draw(methods), path)
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        pictures.append({"data": data, "caption": figure.caption_of(methods), "wide": figure.wide})
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["unbroken"] = _unbroken
    html = environment.from_string(PAGE).render(**_content(methods), figures=pictures)
    write_csv(methods, output)
    write_text(output, html)
    return methods


def _content(methods: Sequence[Method]) -> dict[str, Any]:
    found = sections(methods)
    records = [record for method in methods for record in method.records]
    cells = [cell for section in found for row in section.rows for cell in row.cells]
    several = len(records) > len(methods)
    return {
        "title": "Report: " + ", ".join(short(method.name, 60) for method in methods),
        "style": STYLE,
        "subtitle": _subtitle(methods),
        "verdicts": verdicts(methods),
        "caveats": caveats(methods),
        "methods": [_method(method, i) for i, method in enumerate(methods)],
        "runs": [_run(record) for record in records],
        "several": several,
        "by_method": len(methods) > MOST_COLUMNS,
        "word_intervals": any(cell.interval for cell in cells) and any(len(method.records) == 1 for method in methods),
        "sections": found,
        "sliding": _sliding(methods),
        "tokens": under_trained(methods),
        "examples": examples(methods),
        "generated": how_generated(methods),
        "facts": facts(methods),
    }


def _unbroken(text: str) -> str:
    """No line ends inside the brackets of an interval."""
    return re.sub(r"(\[[^][ ]+), ([^][ ]+\])", "\\1,\u00a0\\2", text)


def _sliding(methods: Sequence[Method]) -> str:
    windows = [method.first.evaluation["sliding_window"] for method in methods]
    sizes = {(facts.get("window"), facts.get("stride")) for facts in windows if facts}
    said = " or ".join(f"{window} tokens moved by {stride}" for window, stride in sorted(sizes, key=str))
    return f"Sliding window: {said}; the others side by side." if said else ""


def _method(method: Method, place: int) -> dict[str, Any]:
    seeds = ", ".join(str(record.seed) for record in method.records[1:])
    return {
        "name": method.name,
        "colour": colour(place),
        "seeds": "1 seed" if len(method.records) == 1 else f"{len(method.records)} seeds",
        "recipe": method.first.recipe_text,
        "recipe_note": f" with seed {method.first.seed} (the others: {seeds})" if seeds else "",
    }


def _run(record: RunRecord) -> dict[str, Any]:
    """Its folder, and what ``evaluate`` takes to make its evaluation again."""
    folder = shlex.quote(str(record.folder))
    if not (published := record.evaluation["method"] is None):
        return {"folder": folder, "evaluated": folder, "published": published}
    path = shlex.quote(f"PATH_TO/{record.evaluation['run']}")
    return {"folder": folder, "evaluated": f"{path} --data RECIPE --output {folder}", "published": published}


def _subtitle(methods: Sequence[Method]) -> str:
    records = [record for method in methods for record in method.records]
    runs = "1 run" if len(records) == 1 else f"{len(records)} runs"
    if len(records) > len(methods):
        runs += f" of {len(methods)} {'method' if len(methods) == 1 else 'methods'}"
    splits = ", ".join(sorted({str(record.evaluation["split"]) for record in records}))
    targets = sorted({look_up(record.evaluation, ("target_tokens", "total")) or 0 for record in records})
    return f"{runs}, evaluated on {' and '.join(map(grouped, targets))} tokens of the {splits} split."
