"""The figures of a study show every series, and draw no curve where nothing may be claimed."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pretrain.report.figure_style import DOTS_PER_INCH, INK, colour
from pretrain.study.fits import Fit, fit_measure
from pretrain.study.study_cells import ISOTROPY, LOSS, Study, observations, read_study
from pretrain.study.study_figures import (
    HeatMap,
    Picture,
    beyond,
    difference_figure,
    heat_map,
    heat_map_figure,
    scale_figure,
    spectrum_figure,
)
from tests.study.synthetic_records import study_records


@pytest.fixture(scope="module")
def study() -> Study:
    return read_study(study_records())


def shape_of(study: Study) -> HeatMap:
    shape = heat_map(study)
    assert shape is not None
    return shape


def pixels(figure: Figure) -> npt.NDArray[np.float64]:
    stored = io.BytesIO()
    figure.savefig(stored, format="png", dpi=DOTS_PER_INCH)
    stored.seek(0)
    return np.asarray(matplotlib.image.imread(stored)[..., :3], dtype=np.float64)


def share_of_colour(image: npt.NDArray[np.float64], name: str) -> float:
    wanted = np.array([int(name[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float((np.abs(image - wanted).max(axis=2) < 0.02).mean())


def fits_of(study: Study) -> dict[tuple[str, str], Fit]:
    return {
        (series.label, measure.column): fit_measure(*observations(series.rows, measure, study.scale), draws=10)
        for series in study.series for measure in (LOSS, ISOTROPY)
    }  # fmt: skip


def test_every_series_is_shown_in_its_colour(study: Study) -> None:
    scales, differences = scale_figure(study, {}), difference_figure(study)
    assert (len(scales.axes), len(differences.axes)) == (4, 4)
    for axes in scales.axes:
        assert {line.get_color() for line in axes.lines} == {colour(0), colour(1), colour(2)}
    for axes in differences.axes:
        assert {line.get_color() for line in axes.lines} == {INK, colour(1), colour(2)}  # plain is the line at zero
    assert share_of_colour(pixels(scales), colour(2)) > 1e-4


def test_a_curve_leaves_the_data_only_where_a_dependence_was_found(study: Study) -> None:
    fits = fits_of(study)
    largest = max(row["parameters_without_embeddings"] for row in study.rows)
    depends, flat = fits["plain", ISOTROPY.column], fits["agg30", ISOTROPY.column]
    assert (depends.depends, flat.verdict) == (True, "flat")
    assert beyond(depends)[-1] > 2 * largest
    assert beyond(flat)[-1] == pytest.approx(largest)
    isotropy = scale_figure(study, fits).axes[2]
    drawn = {
        line.get_color(): max(np.asarray(line.get_xdata(), dtype=float))
        for line in isotropy.lines if len(np.asarray(line.get_xdata())) > 20
    }  # fmt: skip
    assert drawn[colour(2)] <= largest * (1 + 1e-9)
    assert drawn[colour(0)] > 2 * largest


def test_nothing_fitted_draws_no_curve() -> None:
    study = read_study(study_records(sizes=("xs", "l")))
    figure = scale_figure(study, fits_of(study))
    assert all(len(np.asarray(line.get_xdata())) < 20 for axes in figure.axes for line in axes.lines)
    assert share_of_colour(pixels(figure), colour(0)) > 1e-4


def test_the_heat_map_says_the_means(study: Study) -> None:
    figure = heat_map_figure(shape_of(study))
    rows = [row for row in study.rows if row["run"].startswith("m_agg10")]
    mean = np.mean([row["measure.isotropy"] for row in rows])
    isotropy = figure.axes[2]
    assert f"{mean:#.3g}" in [text.get_text() for text in isotropy.texts]
    assert len(isotropy.texts) == 4 * 3
    assert [label.get_text() for label in isotropy.get_xticklabels()] == ["200K", "800K", "3.2M", "12.8M"]


def test_numbers_of_a_heat_map_of_many_columns_do_not_touch() -> None:
    scales = [100_000 * 2**i for i in range(9)]
    rows = [
        row | {"run": f"{row['run']}_{scale}", "parameters_without_embeddings": scale}
        for row in study_records(sizes=("xs",), methods=("plain", "agg30")) for scale in scales
    ]  # fmt: skip
    figure = heat_map_figure(shape_of(read_study(rows)))
    pixels(figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        assert len(boxes) == 2 * 9
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_spectra_by_method_and_scale(study: Study) -> None:
    spectra = {row["run"]: np.linspace(5, 1, 64) for row in study.rows if row["method"] != "agg10"}
    figure = spectrum_figure(study, spectra)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["plain", "agg30"]
    assert [len(axes.lines) for axes in figure.axes] == [12, 12]
    assert len({line.get_color().tobytes() for line in figure.axes[0].lines}) == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("column", ["measure.perplexity.rare", "measure.isotropy"])
def test_a_measure_that_no_run_has(column: str) -> None:
    study = read_study([row | {column: None} for row in study_records(sizes=("xs", "l"))])
    for figure in (scale_figure(study, {}), difference_figure(study), heat_map_figure(shape_of(study))):
        assert pixels(figure).std() > 0.02


def test_saved_as_png_and_pdf_and_the_style_of_the_process_is_left_alone(study: Study, tmp_path: Path) -> None:
    before: dict[str, Any] = dict(matplotlib.rcParams)
    path = Picture("heat", "means", heat_map_figure(shape_of(study))).save(tmp_path / "new")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["heat.pdf", "heat.png"]
    assert dict(matplotlib.rcParams) == before


def test_a_heat_map_needs_two_axes() -> None:
    rows = [row for row in study_records(methods=("agg10", "agg30")) if row["axis.size"] == "xs"]
    assert heat_map(read_study(rows)) is None
    over = [
        row | {"run": f"{row['run']}_{rate}", "axis.learning_rate": rate, "measure.isotropy": rate + row["seed"] / 8}
        for row in rows
        for rate in (0.25, 0.5)
    ]
    shape = shape_of(read_study(over))
    assert (shape.across, list(shape.columns)) == ("learning rate", ["0.25", "0.5"])
    assert list(shape.rows) == ["objective agg10", "objective agg30"]
    isotropy = heat_map_figure(shape).axes[2]
    assert [text.get_text() for text in isotropy.texts] == ["0.500", "0.750", "0.500", "0.750"]
