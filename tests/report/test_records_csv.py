"""The numbers as files for other tools."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from pretrain.report.intervals import t_interval
from pretrain.report.methods import group_runs
from pretrain.report.records_csv import METHOD_COLUMNS, RUN_COLUMNS, write_csv
from pretrain.report.run_records import read_runs
from tests.report.synthetic_runs import write_published_model, write_seeds


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_a_method_and_measure(tmp_path: Path) -> None:
    folders = [*write_seeds(tmp_path, "mle", (1, 2, 3), name='plain, "old"'), *write_seeds(tmp_path, "agg", (2, 3, 4))]
    methods = group_runs(read_runs([*folders, write_published_model(tmp_path)]))
    write_csv(methods, tmp_path / "page.html")
    rows, runs = rows_of(tmp_path / "page.csv"), rows_of(tmp_path / "page_runs.csv")
    assert tuple(rows[0]) == METHOD_COLUMNS
    assert tuple(runs[0]) == RUN_COLUMNS
    of = {(row["method"], row["measure"]): row for row in rows}
    assert len(of) == len(rows)

    values = [float(row["value"]) for row in runs if row["method"] == "agg" and row["measure"] == "perplexity.rare"]
    row, expected = of["agg", "perplexity.rare"], t_interval(values)
    found = [float(row[key]) for key in ("mean", "low", "high", "seeds")]
    assert found == [expected.mean, expected.low, expected.high, 3]
    assert (row["baseline"], row["difference_unit"], row["paired_seeds"]) == ('plain, "old"', "percent", "2")
    assert -72 < float(row["difference_low"]) < float(row["difference"]) < float(row["difference_high"]) < -55
    assert of["agg", "isotropy"]["difference_unit"] == "absolute"
    assert of["agg", "unique_tokens.rare"]["human_text"] == "314.0"
    assert of['plain, "old"', "perplexity.rare"]["baseline"] == ""

    assert of["gpt2", "unique_tokens.rare"]["human_text"] == "52.0"

    model = of["gpt2", "isotropy"]
    assert (model["seeds"], model["low"], model["difference"]) == ("1", "", "")
    assert ("gpt2", "training.tokens_per_second") not in of
    assert {row["seed"] for row in runs if row["method"] == "gpt2"} == {""}
    assert float(model["mean"]) == pytest.approx(0.167)
