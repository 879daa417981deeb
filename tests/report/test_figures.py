"""Figures are drawn for one run and for several, and where little was measured."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.figure import Figure

from pretrain.report.difference_figure import difference_figure
from pretrain.report.embedding_figures import projection_figure
from pretrain.report.figure_style import DOTS_PER_INCH, METHOD_COLOURS, METHOD_MARKERS, colour, marker, save_png
from pretrain.report.figures import DIFFERENCES, FIGURES, FigureOfReport, figures_of
from pretrain.report.methods import Method, group_runs
from pretrain.report.run_records import read_runs
from pretrain.report.training_figures import gates_figure, geometry_figure, training_figure
from tests.report.synthetic_runs import (
    STEPS,
    change_records,
    skip_step,
    write_published_model,
    write_run,
    write_seeds,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    runs = [write_run(root, "plain", "mle"), write_run(root, "gated"), write_run(root, "$gated_2$", "exclude")]
    return [*runs, write_run(root, "scattered-1", "agg", 5), write_run(root, "scattered-2", "agg", 6)]


def of(folders: list[Path]) -> list[Method]:
    return group_runs(read_runs(folders))


def pixels(figure: Figure) -> npt.NDArray[np.float64]:
    stored = io.BytesIO()
    figure.savefig(stored, format="png", dpi=DOTS_PER_INCH)
    stored.seek(0)
    return np.asarray(matplotlib.image.imread(stored)[..., :3], dtype=np.float64)


def share_of_colour(image: npt.NDArray[np.float64], colour: str) -> float:
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float((np.abs(image - wanted).max(axis=2) < 0.02).mean())


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
@pytest.mark.parametrize("runs", [1, 3])
def test_every_figure_shows_every_run(figure: FigureOfReport, runs: int, folders: list[Path]) -> None:
    image = pixels(figure.draw(of(folders[:runs])))
    assert DOTS_PER_INCH >= 150
    assert image.shape[1] >= (6 if figure.wide else 4.5) * DOTS_PER_INCH
    assert image.std() > 0.05
    for i in range(3):
        assert (share_of_colour(image, METHOD_COLOURS[i]) > 1e-4) == (i < runs), i


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_a_run_that_measured_little(figure: FigureOfReport, tmp_path: Path) -> None:
    """Nothing logged, no id unseen, one row of zeros, an embedding of rank one."""
    folder = write_run(tmp_path, "short")
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    arrays = dict(np.load(folder / "evaluation.npz"))
    arrays["token_counts"] = np.full_like(arrays["token_counts"], 3)
    arrays["singular_values"][1:] = 0
    np.savez(folder / "evaluation.npz", **arrays)
    assert pixels(figure.draw(of([folder]))).std() > 0.02


def test_all_panels_of_the_projection_have_the_same_limits(folders: list[Path]) -> None:
    panels = projection_figure(of(folders[:3])).axes[:3]
    assert [panel.get_title(loc="left") for panel in panels] == ["plain", "gated", "$gated_2$"]
    assert len({(panel.get_xlim(), panel.get_ylim()) for panel in panels}) == 1
    low, high = panels[0].get_xlim()
    assert low < 0 < high


def test_the_style_of_the_process_is_left_alone(folders: list[Path]) -> None:
    before = dict(matplotlib.rcParams)
    for figure in FIGURES:
        figure.draw(of(folders[:1]))
    assert dict(matplotlib.rcParams) == before


def test_a_figure_is_saved_whole(tmp_path: Path, folders: list[Path]) -> None:
    path = tmp_path / "new" / "one.png"
    save_png(FIGURES[0].draw(of(folders[:1])), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in path.parent.iterdir()] == ["one.png"]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
@pytest.mark.parametrize("arrays", [True, False])
def test_a_published_model_alone_and_beside_runs(
    figure: FigureOfReport, arrays: bool, folders: list[Path], tmp_path: Path
) -> None:
    model = write_published_model(tmp_path, arrays=arrays)
    drawn = figure.draw(of([model]))
    texts = [text.get_text() for axes in drawn.axes for text in axes.texts]
    if figure.name in ("training", "geometry", "gates") or not arrays:
        assert any(text.startswith("not measured") for text in texts)
    if arrays:
        assert pixels(figure.draw(of([*folders[:2], model]))).std() > 0.05


def test_no_panel_is_left_without_a_method(folders: list[Path]) -> None:
    """Four panels on a grid of six places: the others are gone."""
    figure = projection_figure([Method(str(i), method.records) for i, method in enumerate(of(folders[:2]) * 2)])
    assert len([axes for axes in figure.axes if axes.get_title(loc="left")]) == 4
    assert len(figure.axes) == 5  # and the bar of colours


def test_seeds_are_one_line_with_a_band(folders: list[Path]) -> None:
    (method,) = of(folders[3:])
    panel = geometry_figure([method]).axes[0]
    (line,), (band,) = panel.lines, panel.collections
    curves = [record.series("isotropy")[1] for record in method.records]
    np.testing.assert_allclose(line.get_ydata(), np.mean(curves, axis=0))
    tops = band.get_paths()[0].vertices[:, 1]
    assert (tops.min(), tops.max()) == pytest.approx((np.min(curves), np.max(curves)))
    assert not geometry_figure(of(folders[:1])).axes[0].collections  # a single run has no band


def test_a_skipped_step_of_one_seed_empties_no_panel(tmp_path: Path) -> None:
    runs = write_seeds(tmp_path, "agg", (1, 2, 3))
    skip_step(runs[1], 10)
    for draw in (training_figure, geometry_figure, gates_figure):
        panels = draw(of(runs)).axes
        assert [text.get_text() for panel in panels for text in panel.texts] == []
        assert all(np.size(line.get_xdata()) for panel in panels for line in panel.lines)


LOSSES: dict[str, Callable[[float], tuple[float, float]]] = {  # training and validation, by the part that is trained
    "ordinary": lambda part: (3.2 + 4 * math.exp(-12 * part), 3.3 + 4 * math.exp(-12 * part)),
    "finetune": lambda part: (3.3 - 0.1 * part, 3.55 - 0.05 * part),
    "overfit": lambda part: (3.2 - 2 * part, 3.3 + 2.2 * part**2),
    "diverge": lambda part: (3.2 + 5 * (part > 0.5), 3.3 + 5.5 * (part > 0.5)),
    "drop": lambda part: (3.2, 2.8),
    "not finite": lambda part: (3.2, 2.8 if part < 0.9 else math.nan),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_panel_shows_all_but_the_first_fall(kind: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, kind)
    change_records(folder, lambda record: change_losses(record, LOSSES[kind]))
    panel = training_figure(of([folder])).axes[0]
    low, high = panel.get_ylim()
    _, smooth, validation = [np.asarray(line.get_xydata()) for line in panel.lines]
    assert len(validation) == 20
    for x, y in (*smooth, *validation):
        assert math.isnan(y) or (low < y and (y < high or x < 0.04 * smooth[-1, 0])), (kind, x)
    if kind == "ordinary":  # what falls at once takes no room
        assert high < smooth[0, 1] - 0.8


def change_losses(record: dict[str, Any], losses: Callable[[float], tuple[float, float]]) -> None:
    record["loss"], validation = losses(record["step"] / STEPS)
    if "validation_loss" in record:
        record["validation_loss"] = validation


def test_gates_are_those_of_the_last_measured_step(folders: list[Path]) -> None:
    method = of(folders[1:2])[0]
    _, gates, shares, _ = gates_figure([method]).axes
    last = [entry for entry in method.first.metrics if "g1_by_decile" in entry][-1]
    g1 = [last["g1_by_decile"][str(i)] for i in range(1, 11)]
    assert list(gates.lines[0].get_ydata()) == g1
    assert gates.lines[1].get_ydata()[0] == last["g1_by_decile"]["never_seen"]
    assert [line.get_ydata()[-1] for line in shares.lines] == list(last["gated_share"].values())


def test_intervals_of_the_differences(tmp_path: Path) -> None:
    """Filled where an interval excludes zero; drawn only where seeds are paired."""
    runs = [write_run(tmp_path, f"a{i}", "mle", i, isotropy=0.2 + 0.1 * i) for i in range(3)]
    runs += [write_run(tmp_path, f"b{i}", "agg", i, isotropy=value) for i, value in enumerate((0.3, 0.41, 0.5))]
    runs += [write_run(tmp_path, f"c{i}", "z_loss", i, isotropy=value) for i, value in enumerate((0.5, 0.1, 0.4))]
    methods = of(runs)
    panel = difference_figure(methods).axes[2]
    marks = [line for line in panel.lines if line.get_marker() not in ("None", "")]
    assert [mark.get_markerfacecolor() for mark in marks] == [METHOD_COLOURS[1], "white"]
    assert marks[0].get_xdata()[0] == pytest.approx(0.31 / 3)
    (low, high), *_ = [line.get_xdata() for line in panel.lines if len(line.get_xdata()) == 2 and line not in marks][1:]
    assert (low, high) == pytest.approx((0.31 / 3 - 0.0143422, 0.31 / 3 + 0.0143422), abs=1e-6)
    assert figures_of(methods)[0] is DIFFERENCES
    assert DIFFERENCES not in figures_of(methods[:1])
    assert DIFFERENCES not in figures_of(of([runs[0], runs[3]]))


@pytest.mark.parametrize("figure", [DIFFERENCES, *FIGURES], ids=lambda figure: figure.name)
def test_more_methods_than_colours(figure: FigureOfReport, tmp_path: Path) -> None:
    pairs = [write_seeds(tmp_path, kind, (1, 2)) for kind in ("mle", "agg")]
    methods = [method for method in of([folder for pair in pairs for folder in pair]) for _ in range(5)]
    assert pixels(figure.draw([Method(f"method {i}", method.records) for i, method in enumerate(methods)])).std() > 0.03
    looks = {(colour(i), marker(i)) for i in range(24)}
    assert len(looks) == 24
    assert len(METHOD_COLOURS) == 8 and len(METHOD_MARKERS) == 9
