"""Which number is better, and what is said about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pretrain.errors import UserError
from pretrain.report.catalogue import measures
from pretrain.report.comparison import ONE_SEED, caveats, verdicts
from pretrain.report.formatting import (
    ABSENT,
    MINUS,
    as_percent,
    compact,
    count,
    duration,
    fixed,
    percents,
    signed,
    tick,
)
from pretrain.report.measures import Measure
from pretrain.report.methods import Method, group_runs
from pretrain.report.run_records import read_runs
from pretrain.report.table import summary_table
from tests.report.synthetic_runs import untied, write_published_model, write_run, write_seeds

PERPLEXITY = {"frequent": 41.3, "medium": 2904.0, "rare": 20000.0, "total": 100.0}


def two(folder: Path, **evaluation: Any) -> list[Method]:
    return group_runs(read_runs([write_run(folder, "plain", "mle"), write_run(folder, "gated", "agg", **evaluation)]))


def groups(folder: Path, key: str, plain: Sequence[Any], gated: Sequence[Any]) -> list[Method]:
    """Seeds 0, 1, ... of two methods whose entry ``key`` is given."""
    folders = [write_run(folder, f"plain-{i}", "mle", i, **{key: value}) for i, value in enumerate(plain)]
    folders += [write_run(folder, f"gated-{i}", "agg", i, **{key: value}) for i, value in enumerate(gated)]
    return group_runs(read_runs(folders))


def said_of(methods: Sequence[Method], what: str) -> tuple[str, str]:
    (verdict,) = verdicts(methods)
    return next((claim.text, claim.kind) for claim in verdict.claims if what in claim.text.lower())


def row_of(methods: Sequence[Method], *path: str) -> Measure:
    return next(row for row in measures(methods) if row.path == path)


def test_the_better_way_of_each_number(tmp_path: Path) -> None:
    methods = two(tmp_path, mean_cosine=-0.95)
    best = {row.path: row.best(methods) for row in measures(methods)}
    assert best["perplexity", "rare"] == {1}
    assert best["perplexity", "total"] == {0}
    assert best["bits_per_byte", "sliding_window"] == {0}
    assert best["unique_tokens", "rare"] == {1}
    assert best["isotropy",] == {1}
    assert best["mean_cosine",] == {0}  # nearer to zero, not lower
    assert best["generation", "greedy", "repetition_4"] == {1}  # nearer to the human text, not lower
    assert best["mean_row_norm",] == set()
    assert best["training", "tokens_per_second"] == set()  # the runs were not timed together


def test_nearer_to_the_human_text_is_better_from_both_sides(tmp_path: Path) -> None:
    mine = {"greedy": {"repetition_4": 0.001}, "human": {"repetition_4": 0.02}, "examples": []}
    methods = two(tmp_path, generation=mine)
    row = row_of(methods, "generation", "greedy", "repetition_4")
    assert row.cost(0.001, 0.02) > row.cost(0.03, 0.02)
    assert row.human_value(methods) == 0.02


def test_no_best_without_a_difference_that_shows(tmp_path: Path) -> None:
    same = {"frequent": 41.3, "medium": None, "rare": 29210.4, "total": 98.2}
    methods = two(tmp_path, perplexity=same)
    rows = [row for row in measures(methods) if row.path[0] == "perplexity"]
    assert [row.best(methods) for row in rows] == [set()] * 4
    assert all(row.best(methods[:1]) == set() for row in measures(methods))
    assert rows[1].value(methods[1]) is None
    assert rows[1].change(methods[1], methods[0]) == ""


def test_an_interval_that_excludes_zero_is_a_claim(tmp_path: Path) -> None:
    plain = [PERPLEXITY, PERPLEXITY | {"rare": 22000.0}, PERPLEXITY | {"rare": 24000.0}]
    ratios = (0.56, 0.59, 0.62)
    gated = [tree | {"rare": tree["rare"] * ratio} for tree, ratio in zip(plain, ratios, strict=True)]
    methods = groups(tmp_path, "perplexity", plain, gated)
    # mean of the logs of the ratios -0.52846, standard deviation 0.05090, t(0.975, 2) = 4.30265
    assert said_of(methods, "rare-token") == ("gated lowers rare-token perplexity by 41 % [33, 48].", "better")
    assert (
        row_of(methods, "perplexity", "rare").paired_text(
            row_of(methods, "perplexity", "rare").paired(methods[1], methods[0])  # type: ignore[arg-type]
        )
        == f"{MINUS}41 % [{MINUS}48, {MINUS}33]"
    )


def test_an_interval_that_holds_zero_shows_nothing(tmp_path: Path) -> None:
    plain = [PERPLEXITY | {"total": value} for value in (100.0, 101.0, 102.0)]
    gated = [PERPLEXITY | {"total": value} for value in (98.0, 104.0, 99.0)]
    text, kind = said_of(groups(tmp_path, "perplexity", plain, gated), "total perplexity")
    assert text.startswith(f"Total perplexity: no difference shown ({MINUS}0.7 % [{MINUS}")
    assert kind == "not shown"


def test_pairs_show_what_means_hide(tmp_path: Path) -> None:
    """All seeds differ widely, each pair by about the same: the means' intervals overlap, the paired one is narrow."""
    methods = groups(tmp_path, "isotropy", [0.2, 0.4, 0.6], [0.25, 0.46, 0.65])
    row = row_of(methods, "isotropy")
    plain, gated = (row.of(method) for method in methods)
    assert plain is not None and gated is not None and plain.high is not None and gated.low is not None
    assert plain.high > gated.low
    assert said_of(methods, "isotropy") == ("gated raises isotropy by 0.053 [0.039, 0.068].", "better")
    crossed = groups(tmp_path / "x", "isotropy", [0.2, 0.4, 0.6], [0.65, 0.25, 0.46])
    assert "no difference shown" in said_of(crossed, "isotropy")[0]


def test_worse_is_said_as_well(tmp_path: Path) -> None:
    methods = groups(tmp_path, "mean_cosine", [0.1, 0.1, 0.11], [-0.5, -0.5, -0.52])
    assert said_of(methods, "mean cosine")[1] == "changed"  # through zero: lower, and further from it
    methods = groups(tmp_path / "x", "isotropy", [0.5, 0.5, 0.5], [0.2, 0.21, 0.22])
    assert said_of(methods, "isotropy")[1] == "worse"
    assert said_of(methods, "isotropy")[0].startswith("gated lowers isotropy by 0.290 [")


def test_single_seeds_are_no_claim(tmp_path: Path) -> None:
    (verdict,) = verdicts(two(tmp_path))
    assert verdict.claims == ()
    assert ONE_SEED == "one seed: no interval, so no claim"
    assert verdict.text.startswith(f"gated against plain ({ONE_SEED}).")
    better, worse = verdict.text.split("Worse here: ")
    assert "rare-token perplexity (29.2K to 10.3K, 64.7% lower)" in better
    assert "isotropy (0.167 to 0.853, 5.1 times as much)" in better
    assert "total perplexity (98.2 to 101.3, 3.2% higher)" in worse
    assert "tokens per second" not in worse
    assert "86 distinct rare tokens where the text it reads uses 314" in verdict.text


def test_seeds_that_do_not_match_are_no_claim(tmp_path: Path) -> None:
    folders = write_seeds(tmp_path, "mle", (1, 2)) + write_seeds(tmp_path, "agg", (2, 3))
    (verdict,) = verdicts(group_runs(read_runs(folders)))
    assert verdict.claims == ()
    assert "(fewer than two seeds in common: no paired interval, so no claim)" in verdict.text


def test_a_run_that_only_loses(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "a", "agg"), write_run(tmp_path, "b", "agg", isotropy=0.5)]
    methods = group_runs(read_runs(folders))
    (verdict,) = verdicts(methods)
    assert "No number is better. Worse here: isotropy (0.853 to 0.500, 41.4% lower)." in verdict.text
    assert "Hardly changed: total perplexity" in verdict.text
    assert "a and b have the same settings and seed" in caveats(methods)[0]


def test_words_about_one_method(tmp_path: Path) -> None:
    methods = two(tmp_path)
    (verdict,) = verdicts(methods[:1])
    assert "plain reaches a total perplexity of 98.2 on the test split." in verdict.text
    assert "29.2K, 707.3 times that on frequent ones (41.3)" in verdict.text
    assert caveats(methods[:1]) == []
    seeds = [PERPLEXITY | {"total": total} for total in (99.0, 100.0, 101.0)]
    (verdict,) = verdicts(groups(tmp_path / "x", "perplexity", seeds, []))
    assert "a total perplexity of 100.0 [97.5, 102.5] on the test split, mean of 3 seeds." in verdict.text


def test_what_cannot_be_compared_is_said_and_not_compared(tmp_path: Path) -> None:
    assert [text.split()[0] for text in caveats(two(tmp_path / "a"))] == ["Tokens", "Each"]
    training = {"tokens_per_second": 9000.0, "hardware": "another"}
    methods = two(tmp_path / "b", target_tokens={"total": 5}, tokens=1, training=training)
    text = " ".join(caveats(methods))
    assert "not evaluated on the same targets" in text
    assert "not trained on the same number of tokens" in text
    assert "tokens per second cannot be compared" in text
    assert "perplexity" not in verdicts(methods)[0].text
    row = row_of(methods, "perplexity", "rare")
    assert row.best(methods) == set()
    assert row.change(methods[1], methods[0]) == ""
    assert row.paired(methods[1], methods[0]) is None
    assert row_of(methods, "isotropy").best(methods) == {1}


def test_hardware_that_is_not_known_is_not_the_same(tmp_path: Path) -> None:
    """Checkpoints of earlier versions do not tell theirs."""
    unknown = {"tokens_per_second": 9000.0, "hardware": None}
    folders = [write_run(tmp_path, kind, kind, training=unknown) for kind in ("mle", "agg")]
    text = " ".join(caveats(group_runs(read_runs(folders))))
    assert "Hardware, layout or precision of the runs differ, or are not known" in text


def test_bits_per_byte_are_compared_over_one_text(tmp_path: Path) -> None:
    targets = {"frequent": 1, "medium": 1, "rare": 1, "total": 3}
    bits = {"non_overlapping": 1.5, "sliding_window": 1.4}
    for size, comparable in ((1_204_811, True), (900, False)):
        methods = two(tmp_path / str(size), target_tokens=targets, bits_per_byte=bits | {"text_bytes": size})
        row = row_of(methods, "bits_per_byte", "sliding_window")
        assert row.best(methods) == ({1} if comparable else set())
        assert bool(row.change(methods[1], methods[0])) == comparable
        assert (row.paired(methods[1], methods[0]) is not None) == comparable
        apart = "Nor can their bits per byte: the texts have 1,204,811 and 900"
        assert ("Bits per byte can: the texts" if comparable else apart) in caveats(methods)[0]


def test_generated_text_of_other_targets_is_not_compared(tmp_path: Path) -> None:
    targets = {"frequent": 1, "medium": 1, "rare": 1, "total": 3}
    human = {"frequent": 20, "medium": 12, "rare": 7, "total": 39}
    methods = two(tmp_path, target_tokens=targets, unique_targets=human)
    rows = [row for row in measures(methods) if row.path[0] in ("unique_tokens", "generation")]
    assert len(rows) == 14
    for row in rows:
        assert row.human_value(methods) is None, row.name
        assert row.best(methods) == set(), row.name
        assert row.change(methods[1], methods[0]) == "", row.name
        assert row.paired(methods[1], methods[0]) is None, row.name
    total = row_of(methods, "unique_tokens", "total")
    assert [total.human_value([method]) for method in methods] == [3306, 39]
    assert "distinct tokens and generated texts cannot be compared, nor with one human text" in caveats(methods)[0]


def test_a_run_that_trained_on_after_its_evaluation(tmp_path: Path) -> None:
    methods = two(tmp_path, checkpoint_step=1200)
    found = [text for text in caveats(methods) if "was evaluated at step" in text]
    assert len(found) == 1  # of the other run, all is of one step
    assert found[0].startswith("gated was evaluated at step 1,200, the run is at step 2,000. The table")
    (record,) = methods[1].records
    (record.folder / "checkpoints" / "step_00002000").mkdir(parents=True)  # else there is nothing newer to evaluate
    (alone,) = caveats(methods[1:])
    assert alone.startswith("gated was evaluated at step 1,200, the run is at step 2,000: evaluate it again. The table")


def test_many_intervals_are_counted(tmp_path: Path) -> None:
    folders = [folder for kind in ("mle", "agg", "exclude") for folder in write_seeds(tmp_path, kind, (1, 2, 3))]
    methods = group_runs(read_runs(folders))
    assert "These are 10 intervals, each of 95 % on its own" in caveats(methods)[-1]
    assert not any("intervals" in text for text in caveats(methods[:2]))


def test_a_published_model_beside_runs(tmp_path: Path) -> None:
    folders = [*write_seeds(tmp_path, "mle", (1, 2)), write_published_model(tmp_path)]
    methods = group_runs(read_runs(folders))
    assert [method.name for method in methods] == ["mle", "gpt2"]
    (verdict,) = verdicts(methods)
    assert f"({ONE_SEED})" in verdict.text
    assert "isotropy (0.1" in verdict.text
    assert "perplexity (" not in verdict.text


def test_the_input_embedding_where_there_is_one(tmp_path: Path) -> None:
    tied = {row.path for row in measures(two(tmp_path / "a"))}
    methods = two(tmp_path / "b", input_embedding=untied(0.2))
    paths = {row.path for row in measures(methods)} - tied
    assert ("input_embedding", "isotropy") in paths
    assert ("input_embedding", "word_similarity", "MEN", "spearman") in paths
    assert row_of(methods, "input_embedding", "isotropy").value(methods[0]) is None


def test_what_is_no_number_is_damage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gated/evaluation\.json is damaged: isotropy is 'high', not a number: run"):
        two(tmp_path, isotropy="high")


def test_better_and_worse_are_of_the_seeds_in_common(tmp_path: Path) -> None:
    """A seed that one side alone has may turn the means around."""
    plain = [PERPLEXITY | {"total": total} for total in (100.0, 101.0, 50.0)]
    gated = [PERPLEXITY | {"total": total} for total in (90.0, 91.0)]
    text, kind = said_of(groups(tmp_path, "perplexity", plain, gated), "total perplexity")
    assert "lowers total perplexity" in text
    assert kind == "better"


def test_a_text_of_less_than_a_window(tmp_path: Path) -> None:
    methods = two(tmp_path, sliding_window={"window": 512, "perplexity": PERPLEXITY}, target_tokens={"total": 300})
    assert "gated was measured on 300 tokens, less than one window of 512: too few to compare by." in caveats(methods)
    assert not any("less than one window" in caveat for caveat in caveats(two(tmp_path / "long")))


def test_the_table_of_the_terminal(tmp_path: Path) -> None:
    lines = summary_table(two(tmp_path)).splitlines()
    assert lines[0].split() == ["plain", "gated", "human", "text"]
    cells = {line[:22].rstrip(): line[22:].split() for line in lines[2:]}
    assert cells["perplexity, rare ↓"] == ["29.2K", "10.3K"]
    assert cells["distinct, rare ↑"] == ["34", "86", "314"]
    assert cells["isotropy, all rows ↑"] == ["0.167", "0.853"]
    assert cells["tokens per second"] == ["7,012", "6,941"]
    seeds = [PERPLEXITY | {"total": total} for total in (99.0, 100.0, 101.0)]
    lines = summary_table(groups(tmp_path / "x", "perplexity", seeds, [])).splitlines()
    assert lines[0].split() == ["plain", "human", "text"]
    assert lines[5].split()[-3:] == ["100.0", "[97.5,", "102.5]"]


@pytest.mark.parametrize("runs", [1, 4, 7])
def test_the_table_is_never_wide(runs: int, tmp_path: Path) -> None:
    folders = [write_run(tmp_path, f"a-run-with-quite-a-long-name-{i}") for i in range(runs)]
    lines = summary_table(group_runs(read_runs(folders))).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.count("-name-") for line in lines) == runs


def test_numbers_as_text() -> None:
    assert [compact(value) for value in (8.136, 98.24, 999.94, 1240, 29210, 4.1e6, float("inf"))] == [
        "8.14", "98.2", "999.9", "1.24K", "29.2K", "4.10M", "inf"
    ]  # fmt: skip
    assert [compact(value) for value in (999.96, 999_960, 0)] == ["1.00K", "1.00M", "0.00"]
    assert [tick(value) for value in (0.5, 20, 1500, 4e6)] == ["0.5", "20", "1.5K", "4M"]
    assert [fixed(value) for value in (0.0, 0.1534, 0.00001)] == ["0.000", "0.153", "1.0e-05"]
    assert [count(value) for value in (86.0, 84.67, 1012.4, 0.04, -3.5)] == ["86", "84.7", "1,012", "0.04", "-3.5"]
    assert [signed(value) for value in (0.01, -0.5, 0.0)] == ["+0.010", f"{MINUS}0.500", "0.000"]
    assert signed(-84.67, count) == f"{MINUS}84.7"
    assert as_percent(0.0042) == "0.42"
    assert [duration(value) for value in (12, 200, 7500)] == ["12 s", "3 min 20 s", "2 h 05 min"]


def test_percents_that_stand_together() -> None:
    assert percents(41.04, 35.4, 46.6) == ["41", "35", "47"]
    assert percents(4.6, 2.0, 7.26) == ["4.6", "2.0", "7.3"]
    assert percents(-0.9, -1.9, 0.04) == [f"{MINUS}0.90", f"{MINUS}1.90", "0.04"]  # no bound is rounded to zero
    assert percents(-22.4, None, None) == [f"{MINUS}22", ABSENT, ABSENT]
