"""The rows of the table: where each number stands, how it is shown, which way is better, and means over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pretrain.evaluation.evaluation_file import look_up
from pretrain.report.formatting import (
    TIMES,
    absent,
    negative,
    percents,
    signed,
)
from pretrain.report.intervals import Interval, paired_difference, paired_percent, t_interval
from pretrain.report.methods import Method
from pretrain.report.run_records import RunRecord

Better = Literal["lower", "higher", "near zero", "near human"]
ARROWS = {"lower": "↓", "higher": "↑", "near zero": "→ 0", "near human": "→ human", None: ""}


def always(methods: Sequence[Method]) -> bool:
    return True


def same_targets(methods: Sequence[Method]) -> bool:
    """Whether all were evaluated on the same number of tokens of each group, and so can be compared by them."""
    first = methods[0].first.evaluation["target_tokens"]
    return all(method.first.evaluation["target_tokens"] == first for method in methods)


def same_text(methods: Sequence[Method]) -> bool:
    """Whether all were evaluated on as many bytes of text."""
    return len(text_sizes(methods)) == 1


def text_sizes(methods: Sequence[Method]) -> list[int]:
    """UTF-8 bytes of the texts that methods were evaluated on, each once."""
    return list(dict.fromkeys(method.first.evaluation["bits_per_byte"]["text_bytes"] for method in methods))


@dataclass(frozen=True)
class Measure:
    """One row of the table.

    Attributes:
        section, label: where and how it is named.
        path: keys into ``evaluation.json``.
        better: which way is better; None: neither.
        show: the number as text.
        human: keys of the same number of the human text; empty: there is none.
        in_words: the name in a sentence; empty: not one of the numbers that the text is about.
        by_ratio: whether the change of one run against another reads as a ratio or as a difference (a cosine).
        by_log: whether seeds are paired by the logarithm of their ratio, as a perplexity is, or by their difference.
        comparable: whether it means something beside each other in these methods.
        required: shown, as a dash, where nothing measured it.
    """

    section: str
    label: str
    path: tuple[str, ...]
    better: Better | None
    show: Callable[[float], str]
    human: tuple[str, ...] = ()
    in_words: str = ""
    by_ratio: bool = True
    by_log: bool = False
    comparable: Callable[[Sequence[Method]], bool] = always
    required: bool = False

    @property
    def arrow(self) -> str:
        return ARROWS[self.better]

    @property
    def name(self) -> str:
        """The path with dots, as in files of records."""
        return ".".join(self.path)

    def of_run(self, record: RunRecord) -> float | None:
        return record.number(*self.path)

    def of(self, method: Method) -> Interval | None:
        """Mean and interval over the seeds that have it; None without any."""
        values = [value for record in method.records if (value := self.of_run(record)) is not None]
        return t_interval(values) if values else None

    def value(self, method: Method) -> float | None:
        found = self.of(method)
        return None if found is None else found.mean

    def text(self, method: Method) -> str:
        return absent(self.value(method), self.text_of)

    def text_of(self, value: float) -> str:
        return negative(self.show(value))

    def interval_text(self, found: Interval | None) -> str:
        """[97.1, 99.3]; empty where there is none."""
        if found is None or found.low is None or found.high is None:
            return ""
        return f"[{self.text_of(found.low)}, {self.text_of(found.high)}]"

    def human_value(self, methods: Sequence[Method]) -> float | None:
        """Of the first run that knows the text; None where they were evaluated on several."""
        if not self.human or not self.comparable(methods):
            return None
        values = (record.number(*self.human) for method in methods for record in method.records)
        return next((value for value in values if value is not None), None)

    def cost(self, value: float, human: float | None = None) -> float:
        """Lower is better, whatever ``better`` says."""
        if self.better == "near human":
            return abs(value - human) if human is not None else 0.0
        return {"lower": value, "higher": -value, "near zero": abs(value)}.get(self.better or "", 0.0)

    def change(self, method: Method, first: Method) -> str:
        """Ratio to the first method, or difference from it, without an interval; empty where there is none."""
        value, base = self.value(method), self.value(first)
        if value is None or base is None or not math.isfinite(value) or not math.isfinite(base):
            return ""
        if not self.comparable([method, first]):
            return ""
        if not self.by_ratio:
            return signed(value - base, self.show)
        return f"{TIMES}{value / base:.2f}" if base > 0 else ""

    def paired(self, method: Method, first: Method) -> Interval | None:
        """``method`` minus ``first`` over :meth:`pairs`, in percent if ``by_log``; None without a pair."""
        pairs = self.pairs(method, first)
        if not pairs:
            return None
        values, others = zip(*pairs, strict=True)
        return (paired_percent if self.by_log else paired_difference)(values, others)

    def pairs(self, method: Method, first: Method) -> list[tuple[float, float]]:
        """The numbers of both at the seeds that both have.

        Runs without a seed, and single runs of different seeds, are no pair.
        """
        if not self.comparable([method, first]):
            return []
        bases: dict[int | None, float | None] = {
            record.seed: self.of_run(record) for record in first.records if record.seed is not None
        }
        return [
            (value, base)
            for record in method.records
            if (value := self.of_run(record)) is not None and (base := bases.get(record.seed)) is not None
            and math.isfinite(value) and math.isfinite(base) and (not self.by_log or min(value, base) > 0)
        ]  # fmt: skip

    def paired_text(self, found: Interval) -> str:
        """+0.012 [0.010, 0.014] or +41 % [35, 47]; the interval only where there is one."""
        values = (found.mean, found.low, found.high)
        if self.by_log:
            mean, low, high = percents(*values)
            mean = ("+" if found.mean >= 0 else "") + mean + " %"
        else:
            mean = signed(found.mean, self.show)
            low, high = (absent(value, self.text_of) for value in values[1:])
        return mean if found.low is None else f"{mean} [{low}, {high}]"

    def best(self, methods: Sequence[Method]) -> set[int]:
        """Those with the best number as it is shown; none where all show the same or fewer than two have one."""
        measured = {i: value for i, method in enumerate(methods) if (value := self.value(method)) is not None}
        human = self.human_value(methods)
        texts = {self.show(value) for value in measured.values()}
        unknown = self.better is None or (self.better == "near human" and human is None)
        if unknown or len(texts) < 2 or not self.comparable(methods):
            return set()
        best = self.show(min(measured.values(), key=lambda value: self.cost(value, human)))
        return {i for i, value in measured.items() if self.show(value) == best}


def uneven(method: Method, measure: Measure) -> str:
    """``2 of 3 seeds`` where some runs of a method lack the number."""
    found = measure.of(method)
    missing = found is not None and found.count < len(method.records)
    return f"{found.count} of {len(method.records)} seeds" if found is not None and missing else ""


def by_stem(methods: Sequence[Method], *path: str) -> list[str]:
    """The word similarity sets under ``path`` that any run was measured on."""
    found = {
        name
        for method in methods
        for record in method.records
        for name in (look_up(record.evaluation, path) or {})
    }  # fmt: skip
    return sorted(found)
