"""The records of a study to one self-contained HTML page, its figures, and tidy CSV files."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from pretrain.errors import UserError
from pretrain.evaluation.evaluation_file import read_arrays
from pretrain.files import make_folder, write_text
from pretrain.report.figure_style import colour
from pretrain.report.formatting import ABSENT, MINUS
from pretrain.study.fit_forms import Floats
from pretrain.study.fit_words import SCALES, SYMBOLS, size_text
from pretrain.study.fits import DRAWS, fit_measure
from pretrain.study.state import RunState, read_state
from pretrain.study.study_cells import (
    MEASURES,
    Row,
    Series,
    Study,
    observations,
    partner,
    read_study,
)
from pretrain.study.study_figures import (
    SPECTRA_SHOWN,
    Picture,
    difference_figure,
    heat_map,
    heat_map_figure,
    scale_figure,
    spectrum_figure,
)
from pretrain.study.study_folder import StudyFolder
from pretrain.study.study_tables import (
    as_csv,
    cell_records,
    cell_table,
    difference_records,
    difference_table,
    fit_records,
    fit_table,
)
from pretrain.study.study_template import PAGE, STYLE
from pretrain.study.study_words import Fits, caveats, degeneration_answers, method_answers


def report_study(folder: Path, title: str, question: str, command: str) -> Path:
    """:func:`write_study_report` of the ``records.parquet`` in a study's folder, with the spectra of its runs.

    Raises:
        UserError: there are no records, or they cannot be read or used.
    """
    path = folder / "records.parquet"
    if not path.is_file():
        raise UserError(f"{folder} has no records.parquet: run `python -m pretrain study` on its study file first")
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read {path} ({error}): run `python -m pretrain study` again to write it anew"
        ) from error
    study = StudyFolder(folder)
    states = {name: read_state(study.run(name).path) for name in study.plan()["runs"]}
    return write_study_report(folder, title, question, table, runs=folder, states=states, command=command)


def write_study_report(
    folder: Path,
    title: str,
    question: str,
    table: pa.Table | Sequence[Row],
    *,
    runs: Path | None = None,
    states: Mapping[str, RunState] | None = None,
    command: str = "",
    draws: int = DRAWS,
) -> Path:
    """Write ``report.html``, ``figures/*.png`` and ``*.pdf``, ``cells.csv``, ``differences.csv`` and ``fits.csv``.

    Args:
        folder: where they go; made if need be.
        table: the records of the study, as a table or as rows.
        runs: the folder with the run folders, for the figure of spectra; None: without it.
        states: of all runs that the study plans; None: those of the records.
        command: what was typed to run the study; empty: ``python -m pretrain study NAME.yaml``.
        draws: refits of the bootstrap of each fit.

    Returns:
        The path of the page.

    Raises:
        UserError: the records have another format, lack a column or a measure, or hold no done run.
    """
    study = read_study(table, states)
    fits = _fits(study.series, study.scale, draws)
    others = {
        scale: _fits(study.series_over(scale), scale, draws) for scale in study.varying_scales if scale != study.scale
    }
    pictures = _pictures(study, fits, _spectra(study, runs))
    make_folder(folder)
    shown = []
    for picture in pictures:
        data = picture.save(folder / "figures").read_bytes()
        shown.append({"caption": picture.caption, "data": base64.b64encode(data).decode("ascii")})
    tables = [cell_table(study), difference_table(study), fit_table(study, fits)]
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["raised"] = raised
    page = environment.from_string(PAGE)
    html = page.render(
        title=title,
        question=question,
        style=STYLE,
        subtitle=_subtitle(study),
        scale=f"the {SCALES[study.scale]} {SYMBOLS[study.scale]}",
        colours=[colour(i) for i in range(len(study.series))],
        degeneration=degeneration_answers(study, fits),
        changes=method_answers(study, draws),
        caveats=caveats(study),
        grid=_grid(study),
        pictures=shown,
        tables=[table for table in tables if table is not None],
        command=command or f"python -m pretrain study {study.name}.yaml",
        facts=_facts(study, draws),
    )
    write_text(folder / "cells.csv", as_csv(cell_records(study)))
    write_text(folder / "differences.csv", as_csv(difference_records(study)))
    write_text(folder / "fits.csv", as_csv(fit_records({study.scale: fits, **others})))
    write_text(folder / "report.html", html)
    return folder / "report.html"


def _fits(series: Sequence[Series], scale: str, draws: int) -> Fits:
    return {
        (one.label, measure.column): fit_measure(*observations(one.rows, measure, scale), draws=draws)
        for one in series for measure in MEASURES
    }  # fmt: skip


def _pictures(study: Study, fits: Fits, spectra: dict[str, Floats]) -> list[Picture]:
    scale = f"{SCALES[study.scale]} {SYMBOLS[study.scale]}"
    found = [
        Picture(
            "scale",
            f"Measures against {scale}. Small dots: seeds; markers: their mean with its 95 % interval. Lines: the "
            "curve that the data support, with its 95 % band (bootstrap over sizes and seeds); a level line where no "
            "change was found. Dashed: past the largest size, only where a dependence was found.",
            scale_figure(study, fits),
        )
    ]
    if any(partner(study, series) for series in study.series):
        caption = (
            f"Differences from {study.baseline} between runs with the same seed, with 95 % intervals. "
            "An interval that crosses zero claims nothing."
        )
        found.append(Picture("differences", caption, difference_figure(study)))
    if (shape := heat_map(study)) is not None:
        caption = f"Means over seeds, {shape.across} across. Blue: higher is better; orange: lower is better."
        found.append(Picture("heat_map", caption, heat_map_figure(shape)))
    if spectra:
        caption = (
            "Singular values of the output embedding over the first one, one line a run. A steep first step is one "
            "direction that all rows share."
        )
        if len(study.series) > SPECTRA_SHOWN:
            caption += f" The first {SPECTRA_SHOWN} of {len(study.series)} series."
        found.append(Picture("spectrum", caption, spectrum_figure(study, spectra)))
    return found


def _spectra(study: Study, runs: Path | None) -> dict[str, Floats]:
    """Run -> singular values [D], of the runs that have them.

    Raises:
        UserError: a run's arrays cannot be read.
    """
    found: dict[str, Floats] = {}
    for row in study.rows if runs is not None else ():
        assert runs is not None, "no row without a folder"
        path = runs / str(row["run"]) / "evaluation.npz"
        if path.is_file():
            found[row["run"]] = read_arrays(path, ["singular_values"])["singular_values"].astype(np.float64)
    return found


def raised(text: str) -> Markup:
    """Escaped, and what follows a ^ as an exponent."""
    return Markup(re.sub(rf"\^({MINUS}?[\d.]+)", r"<sup>\1</sup>", str(escape(text))))


def _subtitle(study: Study) -> str:
    total, done = sum(study.states.values()), len(study.rows)
    sizes = len({row[study.scale] for row in study.rows})
    seeds = len({row["seed"] for row in study.rows})
    return (
        f"Study {study.name}: {done} of {total} runs, {_count(len(study.series), 'series', 'series')}, "
        f"{_count(sizes, 'size', 'sizes')}, {_count(seeds, 'seed', 'seeds')}."
    )


def _count(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _grid(study: Study) -> list[tuple[str, str]]:
    found = [(f"axis {name.replace('_', ' ')}", ", ".join(map(str, values))) for name, values in study.axes.items()]
    for column, name in (*SCALES.items(), ("parameters", "parameters")):
        values = sorted({float(row[column]) for row in study.rows})
        shown = [f"{value:,.0f}" if column == "vocab_size" else size_text(value) for value in values]
        found.append((name, ", ".join(shown) if len(shown) <= 8 else f"{shown[0]} to {shown[-1]}"))
    found.append(("checkpoints", f"{len(study.checkpoints)} evaluated; the last of each run is what is shown here"))
    return found


def _facts(study: Study, draws: int) -> list[tuple[str, str]]:
    def all_of(column: str, length: int | None = None) -> str:
        values = sorted({str(row.get(column) or "")[:length] for row in study.rows} - {""})
        return ", ".join(values) or ABSENT

    versions = [(key.removeprefix("version."), all_of(key)) for key in study.rows[0] if key.startswith("version.")]
    return [
        ("hardware", all_of("hardware")),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions) or ABSENT),
        ("commit", all_of("commit", 12)),
        ("seeds", all_of("seed")),
        ("recipes", f"{len({row['recipe_sha256'] for row in study.rows})} different, SHA-256 of each in the records"),
        ("fits", f"soft L1 loss; {draws} bootstrap refits over sizes and seeds from seed 0; 95 % percentile intervals"),
        ("files", "cells.csv, differences.csv, fits.csv, figures/*.png and *.pdf beside this page"),
    ]
