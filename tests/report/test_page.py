"""The page holds everything, needs nothing else, and is not fooled by names."""

from __future__ import annotations

import base64
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.__main__ import parse
from pretrain.errors import UserError
from pretrain.recipe import ObjectiveRecipe
from pretrain.recipe_io import recipe_from_dict, recipe_to_dict
from pretrain.report.facts import Fact, facts
from pretrain.report.figures import FIGURES
from pretrain.report.formatting import ABSENT, MINUS, TIMES
from pretrain.report.methods import group_runs
from pretrain.report.page import write_report
from pretrain.report.run_records import read_runs
from tests.report.synthetic_runs import untied, write_published_model, write_run, write_seeds


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


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the text: drawing takes most of the time."""
    monkeypatch.setattr("pretrain.report.page.figures_of", lambda _: FIGURES[3:4])


def page_of(folders: list[Path], place: Path) -> str:
    write_report(folders, place / "report.html")
    return (place / "report.html").read_text(encoding="utf-8")


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "plain", "mle"), write_run(tmp_path, "gated")]
    output = tmp_path / "out" / "report.html"
    assert [method.name for method in write_report(folders, output)] == ["plain", "gated"]
    html = output.read_text(encoding="utf-8")
    page = Page(html)
    assert page.row("total↓") == ["98.2", f"101.3{TIMES}1.03", ""]
    assert page.row("rare tokens↓") == ["29.2K", f"10.3K{TIMES}0.35", ""]
    assert page.row("rare tokens↑") == ["34", f"86{TIMES}2.53", "314"]
    assert page.row("isotropy, all rows↑") == ["0.167", f"0.853{TIMES}5.11", ""]
    assert page.row("mean shift↓") == ["0.680", f"0.120{MINUS}0.560", ""]
    assert page.row("MEN↑") == ["0.225 [0.195, 0.255]", "0.295 [0.265, 0.325]+0.070", ""]
    assert page.row("tokens per second") == ["7,012", f"6,941{TIMES}0.99", ""]
    assert page.row("trained on")[0] == "4.10M tokens, 2,000 steps of 2,048"
    assert page.row("time") == ["20 min 34 s"] * 2
    assert page.row("method")[1].startswith("adaptive gradient gating (agg): alpha 0.012, counted over one epoch")
    assert re.search(r'class="best"><span class="value">98\.2<', html)
    assert re.search(r'class="best"><span class="value">10\.3K<', html)
    assert "alpha: 0.012" in page.text
    assert "Worse here: total perplexity" in page.text


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "one" / "report.html"
    write_report([write_run(tmp_path, "one")], output)
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


@pytest.mark.usefixtures("few_figures")
def test_one_run_alone_is_not_compared(tmp_path: Path) -> None:
    html = page_of([write_run(tmp_path, "one")], tmp_path)
    page = Page(html)
    assert page.row("total↓") == ["101.3", ""]
    assert 'class="best"' not in html
    assert 'class="change"' not in html
    assert "one reaches a total perplexity of 101.3 on the test split." in page.text


@pytest.mark.usefixtures("few_figures")
def test_names_cannot_write_the_page(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'&amp;{{ 7*7 }}$x$"
    folder = write_run(tmp_path, "plain", run=hostile, method="<b>", word_similarity={"<i>": {"spearman": None}})
    html = page_of([folder], tmp_path)
    page = Page(html)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b", "i"})
    assert hostile in page.text


@pytest.mark.usefixtures("few_figures")
def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path, "one")
    output = tmp_path / "report.html"
    write_report([folder], output)
    before = output.read_bytes()
    monkeypatch.setattr("pretrain.report.page.PAGE", "half {{ nothing.such }}")
    with pytest.raises(Exception, match="nothing"):
        write_report([folder], output)
    assert output.read_bytes() == before
    with pytest.raises(UserError, match="is not a run folder"):
        write_report([tmp_path], output)
    assert {entry.name for entry in tmp_path.iterdir()} == {
        "one",
        "figures",
        "report.html",
        "report.csv",
        "report_runs.csv",
    }


def test_methods_of_seeds(tmp_path: Path) -> None:
    folders = [folder for kind in ("mle", "agg") for folder in write_seeds(tmp_path, kind, (1, 2, 3))]
    html = page_of(folders, tmp_path)
    page = Page(html)
    assert "6 runs of 2 methods" in page.text
    assert "agg lowers rare-token perplexity by 64.8 % [63.8,\u00a065.7]." in page.text
    assert 'class="worse">agg raises total perplexity' in html
    plain, gated, human = page.row("rare tokens↓")
    assert re.fullmatch(r"29\.\dK \[2\d\.\dK, 3\d\.\dK\]", plain)
    assert gated.endswith(f"{MINUS}64.8 % [{MINUS}65.7, {MINUS}63.8]")
    assert human == ""
    assert html.count("3 seeds") >= 2
    assert "Recipe of agg with seed 1 (the others: 2, 3), all values" in page.text
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == len(FIGURES) + 1
    assert (tmp_path / "figures" / "differences.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("few_figures")
def test_many_methods_are_rows(tmp_path: Path) -> None:
    page = Page(page_of([write_run(tmp_path, f"run {i}", "mle", i, method=f"m{i}") for i in range(6)], tmp_path))
    for i in range(6):
        rows = [row for row in page.rows if row and row[0].startswith(f"run {i} 1 seed")]
        assert len(rows) == len([tag for tag, attrs in page.tags if "by-method" in (attrs.get("class") or "")])
    assert sum(row[0] == "human text" for row in page.rows if row) == 3


@pytest.mark.usefixtures("few_figures")
def test_tokens_and_examples(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "plain", "mle"), write_run(tmp_path, "gated", input_embedding=untied(0.2))]
    html = page_of(folders, tmp_path)
    page = Page(html)
    assert ["3117", "\u2581Kazakh", "0", "0.975"] in page.rows
    assert ["3259", "\u2423Solid", "0", "0.885"] in page.rows
    assert ["3330", "\\n\\n", "1", "0.875"] in page.rows
    assert "gated, input embedding" in page.text
    examples = [attrs for tag, attrs in page.tags if tag == "details" and attrs.get("class") == "example"]
    assert examples == [{"class": "example"}] * 3  # closed on a screen
    assert "details-content" in html[html.index("@media print") :]
    assert "64 prompts of 50 tokens from the evaluated split, continued by 100 tokens" in page.text
    assert "temperature 1.0, top-p 0.9" in page.text
    assert page.text.count("in the south of the in the south of the") == 12


def test_a_published_model_beside_a_run(tmp_path: Path) -> None:
    page = Page(page_of([write_run(tmp_path, "plain", "mle"), write_published_model(tmp_path)], tmp_path))
    assert page.row("method") == ["plain cross-entropy (mle)", "a model from elsewhere (Hugging Face folder)"]
    assert page.row("trained on")[1] == ABSENT
    assert page.row("rare tokens↓") == ["29.2K", "29.2K", ""]  # other targets: neither best nor compared
    assert page.row("rare tokens↑") == ["34", "34", ""]  # nor one human text
    assert page.row("repeated 4-grams→ human") == ["0.805", "0.805", ""]
    assert "were not evaluated on the same targets" in page.text
    assert page.text.count("Recipe of") == 1
    commands = [line for line in page.text.splitlines() if line.startswith("python -m pretrain evaluate")]
    plain, published = tmp_path / "plain", tmp_path / "gpt2"
    assert commands == [
        f"python -m pretrain evaluate {plain}",
        f"python -m pretrain evaluate PATH_TO/gpt2 --data RECIPE --output {published}",
    ]
    for command in commands:
        parse(shlex.split(command)[3:])
    assert "RECIPE: the recipe on" in page.text
    assert "gpt2 reaches a total perplexity" in Page(page_of([tmp_path / "gpt2"], tmp_path / "alone")).text


AGG = "adaptive gradient gating (agg): "
ALPHA = f"{AGG}alpha 0.02, counted over one epoch, never-seen ids: gate"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"objective": {"method": "mle"}}, "plain cross-entropy (mle)"),
        ({"objective": {"method": "mle", "z_loss": 1e-4}}, "cross-entropy (mle); with z-loss 0.0001"),
        (
            {
                "objective": {
                    "method": "mle", "label_smoothing": 0.1, "cosine_penalty": 1.0, "mean_penalty": 2e-4,
                    "center_rows": True,
                },
            },
            "cross-entropy (mle); with label smoothing 0.1, cosine penalty 1.0, penalty of the mean row 0.0002, rows "
            "centred after each update",
        ),
        (
            {
                "objective": {"method": "mle"}, "optimizer": {"couple_embeddings": True},
                "model": {"logit_soft_cap": 30.0},
            },
            "cross-entropy (mle); with logits soft-capped at 30.0, coupled Adam",
        ),
        ({"objective": {"alpha": 0.02}}, ALPHA),
        ({"objective": {"alpha": 0.02, "z_loss": 1e-4}}, f"{ALPHA}; with z-loss 0.0001"),
        (
            {"objective": {"rare_fraction": 0.3, "window": "exponential", "window_steps": 50}},
            f"{AGG}rare fraction 0.3, counted over 50 steps, fading exponentially, never-seen ids: gate",
        ),
        ({"objective": {"alpha": 0.02, "gates": "g1"}}, f"{ALPHA}, gate g1 alone"),
        ({"objective": {"alpha": 0.02, "rare_rows": "block"}}, f"{ALPHA}, rare rows: block"),
        (
            {"objective": {"alpha": 0.02, "rare_rows": "freeze", "switch_step": 1500, "rare_rows_after": "gate"}},
            f"{ALPHA}, rare rows: freeze, from step 1,500 gate",
        ),
        (
            {"objective": {"alpha": 0.02, "switch_step": 1500, "rare_rows_after": "train"}},
            f"{ALPHA}, rare rows: gate, from step 1,500 train",
        ),
    ],
)  # fmt: skip
def test_what_a_method_is_said_to_be(sections: dict[str, dict[str, Any]], said: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "run", method=sections["objective"].get("method", "agg"))
    tree = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    tree["objective"] = recipe_to_dict(ObjectiveRecipe(**sections.pop("objective")))
    for section, values in sections.items():
        tree[section] |= values
    recipe_from_dict(tree, "here")  # such a run can be
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    (method,) = group_runs(read_runs([folder]))
    assert facts([method])[0] == Fact("method", [said])


@pytest.mark.parametrize("name", ["report", "report.csv", "report.pdf"])
def test_a_page_is_html(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"--output .*{name} is not a page: name a file that ends in \.html"):
        write_report([write_run(tmp_path, "one")], tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot create the folder /proc/none: No such file or directory"):
        write_report([write_run(tmp_path, "one")], Path("/proc/none/page.html"))
