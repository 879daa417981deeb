"""What the numbers say in plain words, and no more than their intervals say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pretrain.checkpointing.folder import checkpoints_in, step_of
from pretrain.evaluation.evaluation_file import look_up
from pretrain.report.catalogue import main_measures
from pretrain.report.formatting import absent, compact, fixed, percents
from pretrain.report.intervals import Interval
from pretrain.report.measures import Measure, same_targets, same_text, text_sizes
from pretrain.report.methods import Method, repeated_seeds
from pretrain.report.run_records import RunRecord

HARDLY = 0.01  # relative change below which a number of single runs is said to have hardly changed
ONE_SEED = "one seed: no interval, so no claim"


@dataclass(frozen=True)
class Claim:
    """One sentence about one measure; ``kind``: which way, as far as an interval shows it."""

    text: str
    kind: Literal["better", "worse", "changed", "not shown"]


@dataclass(frozen=True)
class Verdict:
    """About one method: ``text`` in one paragraph, or claims from paired intervals. ``place``: in the report."""

    place: int
    heading: str
    text: str
    claims: tuple[Claim, ...] = ()

    @property
    def sentences(self) -> list[str]:
        return [claim.text for claim in self.claims] or [self.text]


def verdicts(methods: Sequence[Method]) -> list[Verdict]:
    """Each method against the first; of one method alone, what it reaches."""
    if len(methods) == 1:
        return [Verdict(0, "", _one_method(methods[0]))]
    return [_against(i, methods[i], methods[0]) for i in range(1, len(methods))]


def caveats(methods: Sequence[Method]) -> list[str]:
    """Why the numbers of these runs may not be comparable, or not certain."""
    records = [record for method in methods for record in method.records]
    found = []
    if not same_targets(methods):
        found.append(
            "The runs were not evaluated on the same targets (their corpus, tokenizer or split differ): their "
            "perplexities, distinct tokens and generated texts cannot be compared, nor with one human text."
            + _of_texts(methods)
        )
    if len({record.evaluation["tokens"] for record in records}) > 1:
        found.append("The runs were not trained on the same number of tokens.")
    found += _trained_on(records)
    found += [
        f"{first.name} and {again.name} have the same settings and seed: they stand apart, as they say nothing about "
        "the spread over seeds."
        for first, again in repeated_seeds(methods)
    ]
    if not _same_machine(methods):
        found.append(
            "Hardware, layout or precision of the runs differ, or are not known: their tokens per second cannot be "
            "compared."
        )
    elif len(records) > 1:
        found.append(
            "Tokens per second are the medians of runs made one after another: what else the machine did is in them, "
            "so they do not tell which method is faster."
        )
    found += [
        f"{record.name} was measured on {targets:,} tokens, less than one window of {window:,}: too few to compare by."
        for record in records
        if (targets := look_up(record.evaluation, ("target_tokens", "total")) or 0)
        < (window := look_up(record.evaluation, ("sliding_window", "window")) or 0)
    ]
    if len(methods) > 1 and all(len(method.records) == 1 for method in methods):
        found.append("Each column is one run with one seed; a difference of a percent can be chance.")
    return found + _many_comparisons(methods)


def _of_texts(methods: Sequence[Method]) -> str:
    if same_text(methods):
        return " Bits per byte can: the texts have as many bytes."
    sizes = " and ".join(f"{size:,}" for size in text_sizes(methods))
    return f" Nor can their bits per byte: the texts have {sizes} bytes."


def _trained_on(records: Sequence[RunRecord]) -> list[str]:
    """Of each run whose metrics go on after the checkpoint that was evaluated."""
    found = []
    for record in records:
        evaluated = record.evaluation["checkpoint_step"]
        if evaluated is not None and record.last_step > evaluated:
            newer = [path for path in checkpoints_in(record.folder / "checkpoints") if step_of(path) > evaluated]
            found.append(
                f"{record.name} was evaluated at step {evaluated:,}, the run is at step {record.last_step:,}"
                f"{': evaluate it again' * bool(newer)}. The table and what is said of it are of the former, the "
                "figures of training and the recipe of the latter."
            )
    return found


def _many_comparisons(methods: Sequence[Method]) -> list[str]:
    measured = [row.paired(method, methods[0]) for row in main_measures(methods) for method in methods[1:]]
    intervals = sum(found is not None and found.low is not None for found in measured)
    if len(methods) < 3 or not intervals:
        return []
    return [
        f"These are {intervals} intervals, each of 95 % on its own and none widened for their number: if no method "
        "differed from the first at all, about one in twenty would still exclude zero."
    ]


def _same_machine(methods: Sequence[Method]) -> bool:
    keys = ("world_size", "tensor_model_parallel_size", "data_parallel_size", "sharding", "precision", "hardware")
    trained = [record.evaluation["training"] for method in methods for record in method.records]
    known = all(look_up(facts, ("hardware",)) or not look_up(facts, ("tokens_per_second",)) for facts in trained)
    return known and len({tuple(str(look_up(facts, (key,))) for key in keys) for facts in trained}) == 1


def _against(place: int, method: Method, first: Method) -> Verdict:
    rows = main_measures([first, method])
    paired = [(row, row.paired(method, first)) for row in rows]
    most = max((found.count for _, found in paired if found is not None), default=0)
    if most >= 2:
        claims = tuple(_claim(row, found, method, first) for row, found in paired)
        return Verdict(place, f"{method.name} against {first.name}, {most} seeds in common", "", claims)
    single = min(len(method.records), len(first.records)) == 1
    why = ONE_SEED if single else "fewer than two seeds in common: no paired interval, so no claim"
    return Verdict(place, f"{method.name} against {first.name}", _as_measured(method, first, rows, why))


def _claim(row: Measure, found: Interval | None, method: Method, first: Method) -> Claim:
    name = row.in_words[:1].upper() + row.in_words[1:]
    if found is None or found.low is None or found.high is None:
        return Claim(f"{name}: not measured at two seeds of both, so no claim.", "not shown")
    if not found.excludes_zero:
        return Claim(f"{name}: no difference shown ({row.paired_text(found)}).", "not shown")
    lower = found.mean < 0
    ends = (-found.mean, -found.high, -found.low) if lower else (found.mean, found.low, found.high)
    by, low, high = percents(*ends) if row.by_log else [row.text_of(end) for end in ends]
    unit = " %" if row.by_log else ""
    text = f"{method.name} {'lowers' if lower else 'raises'} {row.in_words} by {by}{unit} [{low}, {high}]."
    return Claim(text, _which_way(row, found, method, first))


def _which_way(row: Measure, found: Interval, method: Method, first: Method) -> Literal["better", "worse", "changed"]:
    """By the seeds in common, as the claim is; through zero, where nearer to it is better, the sign does not tell."""
    if row.better in ("lower", "higher"):
        return "better" if (found.mean > 0) == (row.better == "higher") else "worse"
    values, bases = zip(*row.pairs(method, first), strict=True)
    value, base = sum(values) / len(values), sum(bases) / len(bases)
    if row.better != "near zero" or value * base < 0:
        return "changed"
    return "better" if abs(value) < abs(base) else "worse"


def _as_measured(method: Method, first: Method, rows: Sequence[Measure], why: str) -> str:
    """Numbers side by side, and that nothing is claimed from them."""
    better: list[str] = []
    worse: list[str] = []
    same: list[str] = []
    for row in rows:
        value, base = row.value(method), row.value(first)
        if value is None or base is None or not row.comparable([method, first]):
            continue
        text = f"{row.in_words} ({row.text_of(base)} to {row.text_of(value)}{_percent(row, value, base)})"
        if abs(value - base) < HARDLY * (abs(base) if row.by_ratio else 1) or value == base:
            same.append(text)
        else:
            (better if row.cost(value) < row.cost(base) else worse).append(text)
    parts = [f"{method.name} against {first.name} ({why})."]
    parts.append(f"Better here: {'; '.join(better)}." if better else "No number is better.")
    parts.append(f"Worse here: {'; '.join(worse)}." if worse else "No number is worse.")
    if same:
        parts.append(f"Hardly changed: {'; '.join(same)}.")
    return " ".join([*parts, _human_text(method)]).strip()


def _percent(row: Measure, value: float, base: float) -> str:
    if not row.by_ratio or base <= 0 or not math.isfinite(value) or not math.isfinite(base):
        return ""
    ratio = value / base
    if ratio >= 2:
        return f", {ratio:.1f} times as much"
    return f", {abs(ratio - 1):.1%} {'higher' if ratio > 1 else 'lower'}"


def _human_text(method: Method) -> str:
    (row,) = (row for row in main_measures([method]) if row.path == ("unique_tokens", "rare"))
    predicted, human = row.value(method), row.human_value([method])
    if predicted is None or human is None:
        return ""
    return f"It predicts {row.show(predicted)} distinct rare tokens where the text it reads uses {row.show(human)}."


def _one_method(method: Method) -> str:
    rows = {row.path: row for row in main_measures([method])}
    total, rare = rows["perplexity", "total"], rows["perplexity", "rare"]
    seeds = len(method.records)
    interval = f" {total.interval_text(total.of(method))}".rstrip()
    mean = f", mean of {seeds} seeds" if seeds > 1 else ""
    parts = [
        f"{method.name} reaches a total perplexity of {total.text(method)}{interval} on the "
        f"{method.first.evaluation['split']} split{mean}."
    ]
    frequent = [record.number("perplexity", "frequent") for record in method.records]
    common = sum(frequent) / len(frequent) if None not in frequent else None  # type: ignore[arg-type]
    value = rare.value(method)
    if value and common and math.isfinite(value / common):
        parts.append(
            f"On rare tokens it is {compact(value)}, {compact(value / common)} times that on frequent ones "
            f"({compact(common)})."
        )
    parts.append(_human_text(method))
    isotropy, cosine = (rows[key].value(method) for key in (("isotropy",), ("mean_cosine",)))
    parts.append(
        f"The isotropy of the output embedding is {absent(isotropy, fixed)} (1: round cloud, 0: narrow cone), "
        f"and two rows have a mean cosine of {absent(cosine, fixed)} (0 in a round cloud)."
    )
    return " ".join(part for part in parts if part)
