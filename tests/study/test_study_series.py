"""Which scale a study has, and what one series of it is."""

from __future__ import annotations

from typing import Any

from pretrain.study.study_cells import LOSS, cells, paired, partner, read_study
from pretrain.study.study_words import caveats
from tests.study.synthetic_records import WIDTHS, Rows, study_records, two_sizes, without

SHAPES = {"xs": (2, 64), "s": (2, 128), "m": (4, 64), "l": (4, 128)}  # depth and width


def test_series_follow_the_axes() -> None:
    """Every axis that neither the size nor the seed nor the method decides makes series; plain has no rare fraction."""
    rows: Rows = []
    for vocabulary in (8192, 16384):
        for row in two_sizes(seeds=1):
            for fraction in (None,) if row["method"] == "plain" else (0.1, 0.3):
                extra = {"axis.vocabulary": vocabulary, "axis.rare_fraction": fraction, "axis.size": row["axis.size"]}
                rows.append(row | extra | {"run": f"{row['run']}_{vocabulary}_{fraction}"})
    study = read_study(rows)
    assert [series.label for series in study.series] == [
        "plain, vocabulary 8192", "plain, vocabulary 16384",
        "agg30, vocabulary 8192, rare fraction 0.1", "agg30, vocabulary 8192, rare fraction 0.3",
        "agg30, vocabulary 16384, rare fraction 0.1", "agg30, vocabulary 16384, rare fraction 0.3",
    ]  # fmt: skip
    bases = [partner(study, series) for series in study.series]
    assert [base and base.fixed["vocabulary"] for base in bases] == [None, None, 8192, 8192, 16384, 16384]


def test_the_scale_is_what_varies() -> None:
    rows = [row for row in two_sizes() if row["axis.size"] == "xs"]
    longer = [row | {"run": row["run"] + "_long", "planned_tokens": 2 * row["planned_tokens"]} for row in rows]
    assert read_study(rows + longer).scale == "planned_tokens"
    assert read_study(two_sizes()).scale == "parameters_without_embeddings"


def test_a_run_that_skipped_steps_stays_with_its_seeds_and_its_pair() -> None:
    rows = [row for row in two_sizes() if row["axis.size"] == "xs"]
    longer = [row | {"run": row["run"] + "_long"} for row in rows]
    for row in longer:
        row |= {key: 2 * row[key] for key in ("planned_tokens", "consumed_tokens", "flops")}
    longer[0]["consumed_tokens"] -= 2048
    study = read_study(rows + longer)
    plain, agg = study.series
    assert study.scale == "planned_tokens"
    assert [len(values) for values in cells(plain.rows, LOSS, study.scale).values()] == [3, 3]
    assert [len(values) for values in paired(agg, plain, LOSS, study.scale).values()] == [3, 3]
    [told] = [caveat for caveat in caveats(study) if "fewer tokens than planned" in caveat]
    assert "skipped: xs_plain_1_long (4,093,952 of 4,096,000)." in told
    assert not any("fewer tokens than planned" in caveat for caveat in caveats(read_study(rows)))


def test_records_of_before_have_one_column_of_tokens() -> None:
    rows = [row | {"consumed_tokens": row["seed"] * 1000} for row in without(two_sizes(), "planned_tokens")]
    study = read_study(rows)
    assert study.scale == "planned_tokens"
    assert all(row["planned_tokens"] == row["consumed_tokens"] for row in study.rows)


def test_two_scales_are_not_mixed_into_one() -> None:
    """Isotropy follows the size alone: nothing may be said to grow with the tokens or the compute."""
    rows: Rows = []
    for times in (1, 2, 4):
        extra = {"axis.tokens": times, "planned_tokens": times * 2_048_000}
        rows += [
            row | extra | {"run": f"{row['run']}_{times}", "flops": row["flops"] * times}
            for row in study_records(methods=("plain",))
        ]
    study = read_study(rows)
    assert study.scale == "parameters_without_embeddings"
    assert [series.label for series in study.series] == [f"plain, tokens {times}" for times in (1, 2, 4)]
    assert {series.fixed["size"] for series in study.series_over("planned_tokens")} == {"xs", "s", "m", "l"}
    assert not any("may depend on" in caveat and "D" in caveat for caveat in caveats(study))


def test_sizes_at_several_tokens_per_parameter_are_not_said_to_be_tokens() -> None:
    """Each amount of tokens occurs at one size only."""
    rows = [
        row | {"axis.tpp": times, "run": f"{row['run']}_{times}"} | tokens_of(row, times * row["parameters"])
        for row in study_records(sizes=("xs", "s", "m"), methods=("plain",))
        for times in (10, 20, 40)
    ]
    study = read_study(rows)
    assert study.scale == "planned_tokens"  # at one size nothing but the tokens varies
    labels = ["plain, size xs", "plain, size s", "plain, size m"]
    assert [series.label for series in study.series] == labels
    assert [len(cells(series.rows, LOSS, study.scale)) for series in study.series] == [3, 3, 3]
    assert [series.label for series in study.series_over("flops")] == labels
    assert not any("N varies" in caveat or "N and" in caveat for caveat in caveats(study))
    over_sizes = study.series_over("parameters_without_embeddings")
    assert [series.label for series in over_sizes] == ["plain, tpp 10", "plain, tpp 20", "plain, tpp 40"]
    two_amounts = read_study([row for row in rows if row["axis.tpp"] != 20])
    assert two_amounts.scale == "parameters_without_embeddings"  # two are too few to fit
    apart = [row for row in rows if (row["axis.size"], row["axis.tpp"]) in (("xs", 10), ("s", 20), ("s", 40))]
    assert [series.label for series in read_study(apart).series_over("planned_tokens")] == labels[:2]


def test_sizes_with_several_vocabularies_are_not_said_to_be_tokens() -> None:
    """The tokens follow both, so that something varies along each scale: of the sizes it is told."""
    rows: Rows = []
    for row in study_records(sizes=("xs", "s", "m"), methods=("plain",)):
        for vocabulary in (4096, 8192, 16384):
            size = row["parameters"] + (vocabulary - 8192) * WIDTHS[row["axis.size"]]
            extra = {"axis.vocabulary": vocabulary, "vocab_size": vocabulary, "run": f"{row['run']}_{vocabulary}"}
            rows.append(row | extra | tokens_of(row, 20 * size) | {"parameters": size})
    study = read_study(rows)
    assert study.scale == "parameters_without_embeddings"
    assert [series.label for series in study.series] == [f"plain, vocabulary {v}" for v in (4096, 8192, 16384)]
    assert any("D and C vary with N" in caveat for caveat in caveats(study))
    for scale in ("vocab_size", "planned_tokens", "flops"):
        assert [series.fixed for series in study.series_over(scale)] == [{"size": size} for size in ("xs", "s", "m")]


def test_depth_and_width_at_several_tokens_per_parameter_are_not_said_to_be_tokens() -> None:
    """Neither decides the size alone."""
    rows: Rows = []
    for row in study_records(methods=("plain",)):
        depth, width = SHAPES[row["axis.size"]]
        for times in (10, 20, 40):
            extra = {"axis.depth": depth, "axis.width": width, "axis.tpp": times, "run": f"{row['run']}_{times}"}
            rows.append(row | extra | tokens_of(row, times * row["parameters"]))
            del rows[-1]["axis.size"]
    study = read_study(rows)
    assert study.scale == "planned_tokens"
    assert [tuple(series.fixed.values()) for series in study.series] == sorted(SHAPES.values())
    over_sizes = study.series_over("parameters_without_embeddings")
    assert [series.label for series in over_sizes] == ["plain, tpp 10", "plain, tpp 20", "plain, tpp 40"]


def tokens_of(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {"planned_tokens": tokens, "consumed_tokens": tokens, "flops": 6.0 * row["parameters"] * tokens}


def test_what_follows_the_size_makes_no_series() -> None:
    """Tokens that follow it, two sizes of them the same, and depth and width that make it."""
    tokens = {"xs": 1_000_000, "s": 1_000_000, "m": 2_000_000, "l": 4_000_000}
    rows = [row | tokens_of(row, tokens[row["axis.size"]]) for row in study_records(methods=("plain",))]
    for row in rows:
        row["axis.depth"], row["axis.width"] = SHAPES[row["axis.size"]]
    study = read_study(rows)
    assert study.scale == "parameters_without_embeddings"
    assert [series.label for series in study.series] == ["plain"]


def test_depth_and_width_at_one_size_make_series() -> None:
    rows: Rows = []
    for depth, width in SHAPES.values():
        extra = {"axis.depth": depth, "axis.width": width}
        rows += [row | extra | {"run": f"{row['run']}_{depth}_{width}"} for row in study_records(("xs",), ("plain",))]
    study = read_study(rows)
    assert study.scale == "parameters_without_embeddings"
    assert [tuple(series.fixed.values()) for series in study.series] == sorted(SHAPES.values())


def test_a_method_with_one_value_of_an_axis_is_compared_at_that_value() -> None:
    """As where an exclusion leaves no more of it, or the other runs are not done yet."""
    every = [
        row | {"axis.rate": rate, "run": f"{row['run']}_{rate}"}
        for row in study_records(sizes=("xs", "s"), methods=("plain", "agg10")) for rate in (0.001, 0.003)
    ]  # fmt: skip
    study = read_study([row for row in every if row["method"] == "plain" or row["axis.rate"] == 0.003])
    bases = [found and found.label for series in study.series for found in [partner(study, series)]]
    assert [series.label for series in study.series] == ["plain, rate 0.001", "plain, rate 0.003", "agg10"]
    assert bases == [None, None, "plain, rate 0.003"]
