"""Runs side by side: which number is better which way, the table, and what it says in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pretrain.report.formatting import TIMES, absent, compact, fixed, grouped, signed
from pretrain.report.run_records import RunRecord, look_up

GROUPS = ("frequent", "medium", "rare", "total")
HARDLY = 0.01  # relative change below which a number is said to have hardly changed


@dataclass(frozen=True)
class Measure:
    """One row of the table.

    Attributes:
        section, label: where and how it is named.
        path: keys into ``evaluation.json``.
        better: which way is better; None: neither.
        show: the number as text.
        by_ratio: whether a change reads as a ratio (perplexity) or as a difference (a cosine).
        in_words: the name in a sentence; empty: not one of the numbers that the text is about.
    """

    section: str
    label: str
    path: tuple[str, ...]
    better: Literal["lower", "higher", "near zero"] | None
    show: Callable[[float], str]
    by_ratio: bool = True
    in_words: str = ""

    @property
    def arrow(self) -> str:
        return {"lower": "↓", "higher": "↑", "near zero": "→ 0", None: ""}[self.better]

    def value(self, record: RunRecord) -> float | None:
        found = look_up(record.evaluation, self.path)
        return None if found is None or math.isnan(found) else float(found)

    def text(self, record: RunRecord) -> str:
        return absent(self.value(record), self.show)

    def cost(self, value: float) -> float:
        """Lower is better, whatever ``better`` says."""
        return {"lower": value, "higher": -value, "near zero": abs(value), None: 0.0}[self.better]

    def change(self, record: RunRecord, first: RunRecord) -> str:
        """Ratio to the first run, or difference from it; empty where there is none."""
        value, base = self.value(record), self.value(first)
        if value is None or base is None or not math.isfinite(value) or not math.isfinite(base):
            return ""
        if not self.by_ratio:
            return signed(value - base)
        return f"{TIMES}{value / base:.2f}" if base > 0 else ""

    def best(self, records: Sequence[RunRecord]) -> set[int]:
        """The runs with the best number as it is shown; none where all show the same or fewer than two have one."""
        measured = {i: value for i, record in enumerate(records) if (value := self.value(record)) is not None}
        texts = {self.show(value) for value in measured.values()}
        if self.better is None or len(texts) < 2:
            return set()
        best = self.show(min(measured.values(), key=self.cost))
        return {i for i, value in measured.items() if self.show(value) == best}


def measures(records: Sequence[RunRecord]) -> list[Measure]:
    """All rows, those of the word similarity sets that any run was measured on included."""
    perplexity, unique = "Perplexity", "Distinct tokens predicted"
    shape, other = "Shape of the output embedding", "Word similarity, Spearman"
    words = {name: f"perplexity of {name} tokens" for name in ("rare", "frequent")} | {"total": "total perplexity"}
    rows = [
        Measure(perplexity, f"{name} tokens" if name != "total" else "total", ("perplexity", name), "lower", compact,
                in_words=words.get(name, ""))
        for name in GROUPS
    ]  # fmt: skip
    rows += [
        Measure(unique, f"{name} tokens" if name != "total" else "total", ("unique_tokens", name), "higher", grouped,
                in_words="distinct rare tokens predicted" if name == "rare" else "")
        for name in GROUPS
    ]  # fmt: skip
    rows += [
        Measure(shape, "isotropy, all rows", ("isotropy",), "higher", fixed, in_words="isotropy"),
        Measure(shape, "isotropy, rows of ids seen in training", ("seen_rows", "isotropy"), "higher", fixed),
        Measure(shape, "isotropy at unit mean norm", ("isotropy_unit_norm",), "higher", fixed),
        Measure(shape, "mean cosine", ("mean_cosine",), "near zero", fixed, by_ratio=False, in_words="mean cosine"),
        Measure(shape, "mean shift", ("mean_shift",), "lower", fixed, by_ratio=False),
        Measure(shape, "effective rank", ("effective_rank",), "higher", compact),
        Measure(shape, "share of the strongest direction", ("top_singular_share",), "lower", fixed, by_ratio=False),
        Measure(shape, "mean row norm", ("mean_row_norm",), None, fixed),
    ]
    names = sorted({name for record in records for name in record.evaluation["word_similarity"] or {}})
    rows += [
        Measure(other, name, ("word_similarity", name, "spearman"), "higher", fixed, by_ratio=False) for name in names
    ]
    return [*rows, Measure("Speed", "tokens per second", ("training", "tokens_per_second"), None, grouped)]


def findings(records: Sequence[RunRecord]) -> list[str]:
    """Sentences computed from the numbers, worse ones included."""
    if len(records) == 1:
        return [_one_run(records[0])]
    return [_against(record, records[0]) for record in records[1:]]


def caveats(records: Sequence[RunRecord]) -> list[str]:
    """Why the numbers of these runs may not be comparable, or not certain."""
    first = records[0].evaluation
    found = []
    if any(record.evaluation["target_tokens"] != first["target_tokens"] for record in records):
        found.append(
            "The runs were not evaluated on the same targets (their corpus, tokenizer or split differ): "
            "their perplexities and distinct tokens cannot be compared."
        )
    if any(record.evaluation["tokens"] != first["tokens"] for record in records):
        found.append("The runs were not trained on the same number of tokens.")
    if len(records) > 1 and _same_machine(records):
        found.append(
            "Tokens per second are the medians of runs made one after another: what else the machine did is in them, "
            "so they do not tell which method is faster."
        )
    elif not _same_machine(records):
        found.append("Hardware, layout or precision of the runs differ: their tokens per second cannot be compared.")
    if len(records) > 1:
        found.append("Each column is one run with one seed; a difference of a percent can be chance.")
    return found


def _same_machine(records: Sequence[RunRecord]) -> bool:
    keys = ("world_size", "tensor_model_parallel_size", "data_parallel_size", "sharding", "precision", "hardware")
    return len({tuple(str(record.evaluation["training"].get(key)) for key in keys) for record in records}) == 1


def _against(record: RunRecord, first: RunRecord) -> str:
    better: list[str] = []
    worse: list[str] = []
    same: list[str] = []
    for measure in measures([record, first]):
        value, base = measure.value(record), measure.value(first)
        if not measure.in_words or value is None or base is None:
            continue
        text = f"{measure.in_words} ({measure.show(base)} to {measure.show(value)}{_percent(measure, value, base)})"
        if abs(value - base) < HARDLY * (abs(base) if measure.by_ratio else 1) or value == base:
            same.append(text)
        else:
            (better if measure.cost(value) < measure.cost(base) else worse).append(text)
    parts = [f"{record.name} against {first.name}."]
    parts.append(f"Better: {'; '.join(better)}." if better else "No number is better.")
    parts.append(f"Worse: {'; '.join(worse)}." if worse else "No number is worse.")
    if same:
        parts.append(f"Hardly changed: {'; '.join(same)}.")
    return " ".join([*parts, _human_text(record)])


def _percent(measure: Measure, value: float, base: float) -> str:
    if not measure.by_ratio or base <= 0 or not math.isfinite(value) or not math.isfinite(base):
        return ""
    ratio = value / base
    if ratio >= 2:
        return f", {ratio:.1f} times as much"
    return f", {abs(ratio - 1):.1%} {'higher' if ratio > 1 else 'lower'}"


def _human_text(record: RunRecord) -> str:
    unique, human = (look_up(record.evaluation, (key, "rare")) for key in ("unique_tokens", "unique_targets"))
    if unique is None or human is None:
        return ""
    return f"It predicts {grouped(unique)} distinct rare tokens where the text it reads uses {grouped(human)}."


def _one_run(record: RunRecord) -> str:
    evaluation = record.evaluation
    rare, frequent, total = (look_up(evaluation, ("perplexity", name)) for name in ("rare", "frequent", "total"))
    reached = absent(total, compact)
    parts = [f"{record.name} reaches a total perplexity of {reached} on the {evaluation['split']} split."]
    if rare and frequent and math.isfinite(rare / frequent):
        parts.append(
            f"On rare tokens it is {compact(rare)}, {compact(rare / frequent)} times that on frequent ones "
            f"({compact(frequent)})."
        )
    parts.append(_human_text(record))
    parts.append(
        f"The isotropy of the output embedding is {fixed(evaluation['isotropy'])} (1: round cloud, 0: narrow cone), "
        f"and two rows have a mean cosine of {fixed(evaluation['mean_cosine'])} (0 in a round cloud)."
    )
    return " ".join(part for part in parts if part)
