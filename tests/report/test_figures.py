"""Figures are drawn for one run and for several, and where little was measured."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.figure import Figure

from pretrain.report.figure_style import DOTS_PER_INCH, RUN_COLOURS, save_png
from pretrain.report.figures import FIGURES, FigureOfReport, projection_figure
from pretrain.report.run_records import read_runs
from tests.report.synthetic_runs import write_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root, "plain", "mle"), write_run(root, "gated"), write_run(root, "$gated_2$", seed=5)]


def pixels(figure: Figure) -> npt.NDArray[np.float64]:
    stored = io.BytesIO()
    figure.savefig(stored, format="png", dpi=DOTS_PER_INCH)
    stored.seek(0)
    return np.asarray(matplotlib.image.imread(stored)[..., :3], dtype=np.float64)


def share_of_colour(image: npt.NDArray[np.float64], colour: str) -> float:
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float((np.abs(image - wanted).max(axis=2) < 0.02).mean())


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
@pytest.mark.parametrize("runs", [1, 2, 3])
def test_every_figure_shows_every_run(figure: FigureOfReport, runs: int, folders: list[Path]) -> None:
    image = pixels(figure.draw(read_runs(folders[:runs])))
    assert DOTS_PER_INCH >= 150
    assert image.shape[1] >= (6 if figure.wide else 4.5) * DOTS_PER_INCH
    assert image.std() > 0.05
    for i in range(3):
        assert (share_of_colour(image, RUN_COLOURS[i]) > 1e-4) == (i < runs), i


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_a_run_that_measured_little(figure: FigureOfReport, tmp_path: Path) -> None:
    """Nothing logged, no id unseen, one row of zeros, an embedding of rank one."""
    folder = write_run(tmp_path, "short")
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    arrays = dict(np.load(folder / "evaluation.npz"))
    arrays["token_counts"] = np.full_like(arrays["token_counts"], 3)
    arrays["singular_values"][1:] = 0
    np.savez(folder / "evaluation.npz", **arrays)
    assert pixels(figure.draw(read_runs([folder]))).std() > 0.02


def test_all_panels_of_the_projection_have_the_same_limits(folders: list[Path]) -> None:
    panels = projection_figure(read_runs(folders)).axes[:3]
    assert [panel.get_title(loc="left") for panel in panels] == ["plain", "gated", "$gated_2$"]
    assert len({(panel.get_xlim(), panel.get_ylim()) for panel in panels}) == 1
    low, high = panels[0].get_xlim()
    assert low < 0 < high


def test_the_style_of_the_process_is_left_alone(folders: list[Path]) -> None:
    before = dict(matplotlib.rcParams)
    for figure in FIGURES:
        figure.draw(read_runs(folders[:1]))
    assert dict(matplotlib.rcParams) == before


def test_a_figure_is_saved_whole(tmp_path: Path, folders: list[Path]) -> None:
    path = tmp_path / "new" / "one.png"
    save_png(FIGURES[0].draw(read_runs(folders[:1])), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in path.parent.iterdir()] == ["one.png"]
