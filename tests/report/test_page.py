"""The page holds everything, needs nothing else, and is not fooled by names."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pretrain.errors import UserError
from pretrain.report.figures import FIGURES
from pretrain.report.formatting import MINUS, TIMES
from pretrain.report.page import write_report
from tests.report.synthetic_runs import write_run


class Page(HTMLParser):
    """Tags with their attributes, the text, and the rows of the tables."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.cell = False
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        self.cell = self.cell or tag in ("td", "th")
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell:
            self.rows[-1][-1] += data

    def row(self, label: str) -> list[str]:
        cells = next(row for row in self.rows if row and row[0].strip() == label)
        return [" ".join(cell.split()) for cell in cells[1:]]


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "plain", "mle"), write_run(tmp_path, "gated")]
    output = tmp_path / "out" / "report.html"
    assert write_report(folders, output) == output
    html = output.read_text(encoding="utf-8")
    page = Page(html)
    assert page.row("total↓") == ["98.2", f"101.3{TIMES}1.03", ""]
    assert page.row("rare tokens↓") == ["29.2K", f"10.3K{TIMES}0.35", ""]
    assert page.row("rare tokens↑") == ["34", f"86{TIMES}2.53", "314"]
    assert page.row("isotropy, all rows↑") == ["0.167", f"0.853{TIMES}5.11", ""]
    assert page.row("mean shift↓") == ["0.680", f"0.120{MINUS}0.560", ""]
    assert page.row("MEN↑") == ["0.225", "0.295+0.070", ""]
    assert page.row("tokens per second") == ["7,012", f"6,941{TIMES}0.99", ""]
    assert page.row("trained on")[0] == "4.10M tokens, 2,000 steps of 2,048"
    assert page.row("time") == ["20 min 34 s"] * 2
    assert page.row("method")[1].startswith("adaptive gradient gating (agg): alpha 0.012, counted over one epoch")
    assert re.search(r'class="best">98\.2<', html)
    assert re.search(r'class="best">10\.3K<', html)
    assert "alpha: 0.012" in page.text
    assert "Worse: perplexity of frequent tokens" in page.text


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    output = write_report([write_run(tmp_path, "one")], tmp_path / "one" / "report.html")
    html = output.read_text(encoding="utf-8")
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", html))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe"})
    images = [attrs["src"] or "" for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(FIGURES)
    for source, figure in zip(images, FIGURES, strict=True):
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (output.parent / "figures" / f"{figure.name}.png").read_bytes()


def test_one_run_alone_is_not_compared(tmp_path: Path) -> None:
    html = write_report([write_run(tmp_path, "one")], tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.row("total↓") == ["101.3", ""]
    assert 'class="best"' not in html
    assert 'class="change"' not in html
    assert "one reaches a total perplexity of 101.3 on the test split." in page.text


def test_names_cannot_write_the_page(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'&amp;{{ 7*7 }}$x$"
    folder = write_run(tmp_path, "plain", run=hostile, method="<b>", word_similarity={"<i>": {"spearman": None}})
    html = write_report([folder], tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b", "i"})
    assert hostile in page.text


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path, "one")
    output = write_report([folder], tmp_path / "report.html")
    before = output.read_bytes()
    monkeypatch.setattr("pretrain.report.page.PAGE", "half {{ nothing.such }}")
    with pytest.raises(Exception, match="nothing"):
        write_report([folder], output)
    assert output.read_bytes() == before
    with pytest.raises(UserError, match="is not a run folder"):
        write_report([tmp_path], output)
    assert {entry.name for entry in tmp_path.iterdir()} == {"one", "figures", "report.html"}
