"""The page of a study answers from its intervals, holds everything, and is not fooled by what it is given."""

from __future__ import annotations

import base64
import csv
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from pretrain.errors import UserError
from pretrain.report.formatting import MINUS
from pretrain.study.fits import Interval
from pretrain.study.state import RunState
from pretrain.study.study_cells import ISOTROPY, LOSS, RARE_LOSS, mean_interval, paired, partner, read_study
from pretrain.study.study_report import raised, report_study, write_study_report
from pretrain.study.study_words import Answer, caveats, method_answers, way
from tests.study.synthetic_records import EXPONENT, LIMIT, SIZES, Rows, study_records, two_sizes, without, write_spectra

DRAWS = 20
COMMAND = "python -m pretrain study mine/x.yaml seed=3"
QUESTION = "Does it grow, and what does AGG change?"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    rows = study_records(methods=("plain", "agg30"))
    write_spectra(folder, rows)
    write_study_report(folder, "A ladder", QUESTION, pa.Table.from_pylist(rows), runs=folder, draws=DRAWS)
    return folder


def text_of(page: Path) -> str:
    html = re.sub(r"<style>.*?</style>|base64,[^\"]*", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", "", html)).split())


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def answers(rows: Rows) -> list[Answer]:
    return method_answers(read_study(rows), draws=5)


def test_the_page_answers_the_question(written: Path) -> None:
    text = text_of(written / "report.html")
    assert f"A ladder Study ladder: 24 of 24 runs, 2 series, 4 sizes, 3 seeds. {QUESTION}" in text
    assert "plain: degeneration grows with N (200K to 12.8M) Isotropy falls by 0.03" in text
    assert "agg30: degeneration neither grows nor fades measurably with N (200K to 12.8M)" in text
    assert "agg30 against plain: better isotropy, mean shift and loss of rare tokens; worse loss of all tokens" in text
    assert "Isotropy: higher at every size (+0.4" in text
    assert "The difference in isotropy widens with N: it rises" in text
    assert "Intervals rest on 3 seeds a size" in text
    assert "C varies with N in this study: what is said to depend on N may depend on it." in text
    assert "python -m pretrain study ladder.yaml" in text
    for fact in ("a processor of 2 cores", "torch 2.13.0", "0123456789ab", "xs, s, m, l", "8.90e12, 2.27e13, 5.86e13"):
        assert fact in text, fact


def test_the_page_needs_nothing_else(written: Path) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link", re.sub(r"base64,[^\"]*", "", html))
    assert "{{" not in html
    for rule in ("--ink:", "@media print", ".question {"):  # the look of the reports of runs, and of this page
        assert rule in html, rule
    images = [base64.b64decode(data) for data in re.findall(r"image/png;base64,([^\"]*)", html)]
    names = ["scale", "differences", "heat_map", "spectrum"]
    assert images == [(written / "figures" / f"{name}.png").read_bytes() for name in names]
    assert all((written / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF") for name in names)


def test_the_tables_beside_the_page(written: Path) -> None:
    rows = study_records(methods=("plain", "agg30"))
    values = [row["measure.isotropy"] for row in rows if row["axis.size"] == "m" and row["method"] == "plain"]
    cells = {
        (r["series"], r["parameters_without_embeddings"], r["measure"]): r for r in read_csv(written / "cells.csv")
    }
    assert len(cells) == 2 * 4 * 9
    cell = cells["plain", str(SIZES["m"]), "isotropy"]
    assert float(cell["mean"]) == pytest.approx(np.mean(values))
    assert float(cell["high"]) - float(cell["mean"]) == pytest.approx(
        4.3027 * np.std(values, ddof=1) / 3**0.5, rel=1e-3
    )
    differences = read_csv(written / "differences.csv")
    assert len(differences) == 4 * 9
    assert {row["base"] for row in differences} == {"plain"}
    fits = {(r["scale"], r["series"], r["measure"]): r for r in read_csv(written / "fits.csv")}
    loss = fits["parameters_without_embeddings", "plain", "perplexity.total"]
    assert loss["form"] == "power law"
    assert float(loss["b_low"]) <= EXPONENT <= float(loss["b_high"])
    assert float(loss["E"]) == pytest.approx(LIMIT, abs=0.25)
    assert ("flops", "plain", "perplexity.rare") in fits and ("flops", "agg30", "mean_shift") in fits


def test_a_method_that_changes_nothing() -> None:
    plain = [row for row in two_sizes() if row["method"] == "plain"]
    agg: Rows = []
    for row in plain:
        shift = 1 + 0.01 * (row["seed"] - 2)  # over three seeds it cancels
        agg.append(row | {"method": "agg", "axis.objective": "agg", "run": row["run"] + "x"})
        agg[-1] |= {key: value * shift for key, value in row.items() if key.startswith("measure.")}
    (answer,) = answers(plain + agg)
    assert answer.head == "agg against plain: no difference can be claimed"
    assert all("no measurable difference at any size" in sentence for sentence in answer.sentences)


def test_differences_are_taken_between_the_same_seeds() -> None:
    rows = [row for row in two_sizes(noise=0.0) if row["axis.size"] == "xs"]
    for row in rows:  # seeds differ by whole nats, the methods by 0.1 within a seed
        total = row["seed"] + (0.1 if row["method"] == "agg30" else 0.0)
        row["measure.perplexity.total"] = float(np.exp(total))
    del rows[[row["method"] for row in rows].index("plain")]  # seed 1 has no partner
    study = read_study(rows)
    plain, agg = study.series
    assert partner(study, plain) is None
    assert partner(study, agg) is plain
    assert paired(agg, plain, LOSS, study.scale) == {SIZES["xs"]: [pytest.approx(0.1), pytest.approx(0.1)]}


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    rows = two_sizes(seeds=1)
    (answer,) = answers(rows)
    assert answer.head.endswith("no difference can be claimed")
    assert all("one seed each, so nothing is claimed" in sentence for sentence in answer.sentences)
    page = write_study_report(tmp_path, "One seed", QUESTION, rows, draws=DRAWS)
    assert 'class="claimed' not in page.read_text(encoding="utf-8")
    text = text_of(page)
    assert "plain: too few sizes to say whether degeneration grows or fades with N" in text
    assert "was measured at 2 sizes: too few sizes to fit" in text
    assert "Some series have one seed at every size" in text
    assert "Intervals rest on" not in text


def test_which_way_is_better() -> None:
    assert way(ISOTROPY, Interval(0.3, 0.1, 0.5)) == "better"
    assert way(RARE_LOSS, Interval(0.3, 0.1, 0.5)) == "worse"
    assert way(RARE_LOSS, Interval(-0.3, -0.5, -0.1)) == "better"
    assert way(RARE_LOSS, Interval(-0.3, -0.7, 0.1)) == ""
    only = mean_interval([0.5])
    assert only is not None
    assert way(ISOTROPY, only) == ""
    assert mean_interval([]) is None


def test_different_vocabularies_have_other_tokens() -> None:
    rows = [row | {"vocab_size": row["seed"] * 8192} for row in two_sizes()]
    assert any("Bits per byte" in caveat for caveat in caveats(read_study(rows)))
    assert not any("Bits per byte" in caveat for caveat in caveats(read_study(two_sizes())))


def test_seeds_are_counted_at_each_size() -> None:
    rows = study_records(sizes=("xs", "s", "m"), methods=("plain", "agg30"))
    assert caveats(read_study(rows))[0].startswith("Intervals rest on 3 seeds a size: they are wide")
    two = [row for row in rows if (row["axis.size"], row["seed"]) != ("m", 3)]
    assert caveats(read_study(two))[0].startswith("Intervals rest on 2 or more seeds a size")
    one = [row for row in two if row["axis.size"] != "m" or row["seed"] == 1 or row["method"] == "plain"]
    found = caveats(read_study(one))
    assert found[0].startswith("Some series have one seed at 1 of 3 sizes: they have no interval there")
    assert found[1].startswith("Intervals rest on 2 or more seeds a size")
    many = study_records(sizes=("xs",), methods=("plain", "agg30"), seeds=5)
    assert not any("seed" in caveat.split(":")[0] for caveat in caveats(read_study(many)))


def test_runs_that_are_not_in_the_records_are_counted() -> None:
    rows = two_sizes(seeds=1)
    states = {row["run"]: RunState(state="done") for row in rows}
    states |= {"late": RunState(), "broken": RunState(state="failed", cause="exit code 1: no room")}
    found = caveats(read_study(rows, states))
    assert "Not all runs are done: 1 failed, 1 planned. They are in no number here." in found
    assert "broken failed: exit code 1: no room." in found


def test_the_last_checkpoint_of_a_run_counts_and_unfinished_runs_are_named() -> None:
    rows = two_sizes()
    early = [row | {"step": 500, "measure.isotropy": 0.0} for row in rows]
    failed = rows[0] | {"run": "broken", "state": "failed"}
    study = read_study([*rows, *early, failed])
    assert len(study.rows) == len(rows)
    assert min(row["measure.isotropy"] for row in study.rows) > 0
    assert any("Not all runs are done: 1 failed." in caveat for caveat in caveats(study))


def test_a_value_that_was_not_measured_is_left_out(tmp_path: Path) -> None:
    rows = two_sizes()
    rows[0]["measure.perplexity.rare"] = None
    rows[1]["measure.isotropy"] = float("inf")
    for row in rows:
        row["measure.perplexity.medium"] = None  # no run has it: a text without such tokens
    text = text_of(write_study_report(tmp_path, "Gaps", QUESTION, rows, draws=DRAWS))
    assert "1 value that cannot be fitted (not finite) left out." in text


def test_names_cannot_write_the_page(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\"'&amp;{{ 7*7 }}$x$^2"
    rows = two_sizes(study=hostile, hardware=hostile)
    for row in rows:
        row["method"] = row["method"].replace("agg30", hostile)
    html = write_study_report(tmp_path, hostile, hostile, rows, draws=DRAWS).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "{{ 7*7 }}" in html
    assert "49" not in re.sub(r"base64,[^\"]*|[\d.,]+\d", "", html)


def test_exponents_are_raised(written: Path) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    assert raised(f"<b> as N^{MINUS}0.21 [") == f"&lt;b&gt; as N<sup>{MINUS}0.21</sup> ["
    assert re.search(rf"falls as N<sup>{MINUS}0\.2\d*</sup> \[", html)


def bad(rows: Rows, **replaced: Any) -> Rows:
    return [row | replaced for row in rows]


def test_records_that_cannot_be_used(tmp_path: Path) -> None:
    rows = two_sizes(seeds=1)
    for table, message in (
        ([], "has no records yet: run `python -m pretrain study`"),
        (bad(rows, format=2), "records have format 2, this version reads 1: collect them again"),
        (without(rows, "format"), "records have format None, this version reads 1"),
        (bad(rows, state="failed"), r"no run of the study 'ladder' is done \(4 failed\): run the study again"),
        (without(rows, "flops"), "records lack the column flops"),
        (without(rows, "measure.mean_shift"), "lack the measure mean_shift: evaluate its runs again"),
    ):
        with pytest.raises(UserError, match=message):
            write_study_report(tmp_path / "none", "Bad", QUESTION, table)
    assert not (tmp_path / "none").exists()


def test_the_files_of_a_study(tmp_path: Path) -> None:
    rows = two_sizes(seeds=1)
    with pytest.raises(UserError, match=r"has no records\.parquet: run `python -m pretrain study`"):
        report_study(tmp_path, "A study", QUESTION, COMMAND)
    (tmp_path / "records.parquet").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"cannot read .*records\.parquet"):
        report_study(tmp_path, "A study", QUESTION, COMMAND)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "records.parquet")
    (tmp_path / "plan.json").write_text(json.dumps({"format": 1, "runs": {row["run"]: {} for row in rows}}))
    assert "Singular values" not in text_of(report_study(tmp_path, "A study", QUESTION, COMMAND))
    write_spectra(tmp_path, rows)
    assert COMMAND in text_of(tmp_path / "report.html")
    assert "Not all runs are done: 4 planned" in text_of(tmp_path / "report.html")
    assert "Singular values" in text_of(report_study(tmp_path, "A study", QUESTION, COMMAND))
    arrays = tmp_path / rows[0]["run"] / "evaluation.npz"
    for torn in (b"torn", b""):
        arrays.write_bytes(torn)
        with pytest.raises(UserError, match=rf"cannot read {arrays} .* evaluate {arrays.parent}` again"):
            report_study(tmp_path, "A study", QUESTION, COMMAND)
