"""Which number is better, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.report.comparison import caveats, findings, measures
from pretrain.report.formatting import ABSENT, MINUS, compact, duration, fixed, signed, tick
from pretrain.report.page import summary_table
from pretrain.report.run_records import RunRecord, read_runs
from tests.report.synthetic_runs import write_run


def two(folder: Path, **evaluation: Any) -> list[RunRecord]:
    return read_runs([write_run(folder, "plain", "mle"), write_run(folder, "gated", "agg", **evaluation)])


def test_the_better_way_of_each_number(tmp_path: Path) -> None:
    records = two(tmp_path, mean_cosine=-0.95)
    best = {row.path: row.best(records) for row in measures(records)}
    assert best["perplexity", "rare"] == {1}
    assert best["perplexity", "total"] == {0}
    assert best["unique_tokens", "rare"] == {1}
    assert best["isotropy",] == {1}
    assert best["mean_cosine",] == {0}  # nearer to zero, not lower
    assert best["mean_row_norm",] == set()
    assert best["training", "tokens_per_second"] == set()  # the runs were not timed together


def test_no_best_without_a_difference_that_shows(tmp_path: Path) -> None:
    same = {"frequent": 41.3, "medium": None, "rare": 29210.4, "total": 98.2}
    records = two(tmp_path, perplexity=same)
    rows = [row for row in measures(records) if row.path[0] == "perplexity"]
    assert [row.best(records) for row in rows] == [set()] * 4
    assert all(row.best(records[:1]) == set() for row in measures(records))
    assert rows[1].text(records[1]) == ABSENT
    assert rows[1].change(records[1], records[0]) == ""


def test_words_say_what_went_the_wrong_way(tmp_path: Path) -> None:
    (text,) = findings(two(tmp_path))
    better, worse = text.split("Worse: ")
    assert "perplexity of rare tokens (29.2K to 10.3K, 64.7% lower)" in better
    assert "isotropy (0.167 to 0.853, 5.1 times as much)" in better
    assert "total perplexity (98.2 to 101.3, 3.2% higher)" in worse
    assert "tokens per second" not in worse
    assert "86 distinct rare tokens where the text it reads uses 314" in text


def test_a_run_that_only_loses(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "a", "agg"), write_run(tmp_path, "b", "agg", isotropy=0.5)]
    (text,) = findings(read_runs(folders))
    assert "No number is better. Worse: isotropy (0.853 to 0.500, 41.4% lower)." in text
    assert "Hardly changed: perplexity of frequent tokens" in text


def test_words_about_one_run(tmp_path: Path) -> None:
    records = two(tmp_path)
    assert "total perplexity of 98.2" in findings(records[:1])[0]
    assert "29.2K, 707.3 times that on frequent ones (41.3)" in findings(records[:1])[0]
    assert caveats(records[:1]) == []


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    assert [text.split()[0] for text in caveats(two(tmp_path / "a"))] == ["Tokens", "Each"]
    training = {"tokens_per_second": 9000.0, "hardware": "another"}
    records = two(tmp_path / "b", target_tokens={"total": 5}, tokens=1, training=training)
    text = " ".join(caveats(records))
    assert "not evaluated on the same targets" in text
    assert "not trained on the same number of tokens" in text
    assert "tokens per second cannot be compared" in text
    assert "tokens per second" not in findings(records)[0]


def test_the_table_of_the_terminal(tmp_path: Path) -> None:
    lines = summary_table(two(tmp_path)).splitlines()
    assert lines[0].split() == ["plain", "gated", "human", "text"]
    cells = {line[:22].rstrip(): line[22:].split() for line in lines[2:]}
    assert cells["perplexity, rare ↓"] == ["29.2K", "10.3K"]
    assert cells["distinct, rare ↑"] == ["34", "86", "314"]
    assert cells["isotropy, all rows ↑"] == ["0.167", "0.853"]
    assert cells["tokens per second"] == ["7,012", "6,941"]


@pytest.mark.parametrize("runs", [1, 4, 7])
def test_the_table_is_never_wide(runs: int, tmp_path: Path) -> None:
    folders = [write_run(tmp_path, f"a-run-with-quite-a-long-name-{i}") for i in range(runs)]
    lines = summary_table(read_runs(folders)).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.count("-name-") for line in lines) == runs


def test_numbers_as_text() -> None:
    assert [compact(value) for value in (8.136, 98.24, 999.94, 1240, 29210, 4.1e6, float("inf"))] == [
        "8.14", "98.2", "999.9", "1.24K", "29.2K", "4.10M", "inf"
    ]  # fmt: skip
    assert [compact(value) for value in (999.96, 999_960, 0)] == ["1.00K", "1.00M", "0.00"]
    assert [tick(value) for value in (0.5, 20, 1500, 4e6)] == ["0.5", "20", "1.5K", "4M"]
    assert [fixed(value) for value in (0.0, 0.1534, 0.00001)] == ["0.000", "0.153", "1.0e-05"]
    assert [signed(value) for value in (0.01, -0.5)] == ["+0.010", f"{MINUS}0.500"]
    assert [duration(value) for value in (12, 200, 7500)] == ["12 s", "3 min 20 s", "2 h 05 min"]
