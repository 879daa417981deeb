"""Which measures a report shows, in which order, and which of them the verdict is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pretrain.report.formatting import as_percent, compact, count, fixed, grouped
from pretrain.report.measures import Measure, by_stem, same_targets, same_text
from pretrain.report.methods import Method

GROUPS = ("frequent", "medium", "rare", "total")
# As they are named in sentences; the verdict is about these.
MAIN = {
    ("perplexity", "total"): "total perplexity",
    ("perplexity", "rare"): "rare-token perplexity",
    ("isotropy",): "isotropy",
    ("mean_cosine",): "mean cosine",
    ("unique_tokens", "rare"): "distinct rare tokens",
}


def measures(methods: Sequence[Method]) -> list[Measure]:
    """All rows that any run has a number for, and those that every evaluation should have."""
    rows = [
        *_perplexities("Perplexity, sequences side by side", ("perplexity",), required=True),
        *_perplexities("Perplexity, sliding window", ("sliding_window", "perplexity"), required=False),
        *_bits(),
        *_distinct(),
        *_shape("Shape of the output embedding", (), required=True),
        *_words(methods, "Word similarity (Spearman)", ()),
        *_generation(),
        *_shape("Shape of the input embedding", ("input_embedding",), required=False),
        *_words(methods, "Word similarity of the input embedding (Spearman)", ("input_embedding",)),
        Measure("Speed", "tokens per second", ("training", "tokens_per_second"), None, grouped, by_log=True),
    ]
    return [row for row in rows if row.required or any(row.value(method) is not None for method in methods)]


def main_measures(methods: Sequence[Method]) -> list[Measure]:
    """The rows of :data:`MAIN`, in its order."""
    by_path = {row.path: row for row in measures(methods)}
    return [by_path[path] for path in MAIN]


def _perplexities(section: str, path: tuple[str, ...], **how: Any) -> list[Measure]:
    return [
        Measure(section, f"{name} tokens" if name != "total" else "total", (*path, name), "lower", compact,
                in_words=MAIN.get((*path, name), ""), by_log=True, comparable=same_targets, **how)
        for name in GROUPS
    ]  # fmt: skip


def _bits() -> list[Measure]:
    return [
        Measure("Bits per byte of text", label, ("bits_per_byte", key), "lower", fixed, by_ratio=False,
                comparable=same_text)
        for key, label in (("non_overlapping", "sequences side by side"), ("sliding_window", "sliding window"))
    ]  # fmt: skip


def _distinct() -> list[Measure]:
    return [
        Measure("Distinct tokens predicted", f"{name} tokens" if name != "total" else "total",
                ("unique_tokens", name), "higher", count, human=("unique_targets", name),
                in_words=MAIN.get(("unique_tokens", name), ""), comparable=same_targets, required=True)
        for name in GROUPS
    ]  # fmt: skip


def _shape(section: str, at: tuple[str, ...], *, required: bool) -> list[Measure]:
    seen = "rows of ids seen in training"

    def row(label: str, key: str | tuple[str, str], better: Any, show: Any = fixed, **how: Any) -> Measure:
        path = (*at, key) if isinstance(key, str) else (*at, *key)
        return Measure(section, label, path, better, show, in_words=MAIN.get(path, ""), required=required, **how)

    return [
        row("isotropy, all rows", "isotropy", "higher"),
        row(f"isotropy, {seen}", ("seen_rows", "isotropy"), "higher"),
        row("isotropy at unit mean norm", "isotropy_unit_norm", "higher"),
        row("mean cosine", "mean_cosine", "near zero", by_ratio=False),
        row(f"mean cosine, {seen}", ("seen_rows", "mean_cosine"), "near zero", by_ratio=False),
        row("mean shift", "mean_shift", "lower", by_ratio=False),
        row("effective rank", "effective_rank", "higher", compact),
        row("share of the strongest direction", "top_singular_share", "lower", by_ratio=False),
        row("mean row norm", "mean_row_norm", None),
    ]


def _words(methods: Sequence[Method], section: str, at: tuple[str, ...]) -> list[Measure]:
    return [
        Measure(section, name, (*at, "word_similarity", name, "spearman"), "higher", fixed, by_ratio=False)
        for name in by_stem(methods, *at, "word_similarity")
    ]


def _generation() -> list[Measure]:
    parts = (
        ("repetition_4", "repeated 4-grams", fixed), ("distinct_1", "distinct tokens, share", fixed),
        ("distinct_2", "distinct 2-grams, share", fixed), ("distinct_3", "distinct 3-grams, share", fixed),
        ("rare_share", "rare tokens", lambda share: f"{as_percent(share)} %"),
    )  # fmt: skip
    return [
        Measure(section, label, ("generation", mode, key), "near human", show, human=("generation", "human", key),
                by_ratio=False, comparable=same_targets)
        for mode, section in (("greedy", "Generated text, most likely token"), ("sampled", "Generated text, sampled"))
        for key, label, show in parts
    ]  # fmt: skip
