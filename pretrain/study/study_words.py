"""The answer of a study in words: what degenerates with scale, and what a method changes. All from intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.study.fit_words import SYMBOLS, astray, number, over, predicate, sentence, size_text, with_interval
from pretrain.study.fits import DRAWS, Fit, Interval, fit_measure
from pretrain.study.study_cells import (
    ISOTROPY,
    LOSS,
    MEAN_SHIFT,
    RARE_LOSS,
    Study,
    StudyMeasure,
    mean_interval,
    paired,
    partner,
)

Fits = Mapping[tuple[str, str], Fit]  # by label of the series and column of the measure
TOLD = (ISOTROPY, MEAN_SHIFT, RARE_LOSS, LOSS)


@dataclass(frozen=True)
class Answer:
    """Attributes: place: of its series; head: the answer in a few words; sentences: what it rests on."""

    place: int
    head: str
    sentences: list[str]


def degeneration_answers(study: Study, fits: Fits) -> list[Answer]:
    """Does degeneration grow or fade with scale, for each series."""
    symbol = SYMBOLS[study.scale]
    found = []
    for i, series in enumerate(study.series):
        shape = {measure: fits[series.label, measure.column] for measure in (ISOTROPY, MEAN_SHIFT)}
        head = f"{series.label}: {_grows_or_fades(shape, symbol)}"
        found.append(
            Answer(
                i, head, [sentence(fits[series.label, measure.column], measure.label, study.scale) for measure in TOLD]
            )
        )
    return found


def direction(measure: StudyMeasure, fit: Fit) -> str:
    """Where a measure goes with the scale: "better", "worse", or "" where no way is certain."""
    if not fit.depends or fit.change is None or not fit.change.excludes(0):
        return ""
    return "better" if (fit.change.value > 0) == (measure.better == "higher") else "worse"


def _grows_or_fades(fits: Mapping[StudyMeasure, Fit], symbol: str) -> str:
    if all(fit.verdict == "too few" for fit in fits.values()):
        return f"too few sizes to say whether degeneration grows or fades with {symbol}"
    ways = {measure: direction(measure, fit) for measure, fit in fits.items()}
    span = over(next(iter(fits.values())))
    worse, better = ([m.label for m, way in ways.items() if way == which] for which in ("worse", "better"))
    if worse and better:
        return f"with {symbol} degeneration grows by {worse[0]} and fades by {better[0]} ({span})"
    if not worse and not better:
        return f"degeneration neither grows nor fades measurably with {symbol} ({span})"
    verb = "grows" if worse else "fades"
    only = f", by {(worse or better)[0]} only" if len(worse or better) < len(ways) else ""
    return f"degeneration {verb} with {symbol}{only} ({span})"


def method_answers(study: Study, draws: int = DRAWS) -> list[Answer]:
    """What each method changes at each scale against the plain one: differences of runs with the same seed."""
    found = []
    for i, series in enumerate(study.series):
        if (base := partner(study, series)) is None:
            continue
        sentences, ways = [], {}
        for measure in TOLD:
            differences = paired(series, base, measure, study.scale)
            text, ways[measure.label] = _difference(measure, differences)
            sentences.append(text)
            if measure is not MEAN_SHIFT and (trend := _trend(measure, differences, study, draws)):
                sentences.append(trend)
        found.append(Answer(i, f"{series.label} against {base.label}: {_summary(ways)}", sentences))
    return found


def way(measure: StudyMeasure, interval: Interval) -> str:
    """Whether a difference is "better", "worse", or "" where its interval holds zero or there is none."""
    if not math.isfinite(interval.low) or not interval.excludes(0):
        return ""
    return "better" if (interval.value > 0) == (measure.better == "higher") else "worse"


def signed_interval(interval: Interval) -> str:
    """+0.31 [0.28, 0.34]; a single seed has no interval."""
    text = number(interval.value) if not math.isfinite(interval.low) else with_interval(interval)
    return f"{'+' if interval.value > 0 else ''}{text}"


def _difference(measure: StudyMeasure, differences: Mapping[float, list[float]]) -> tuple[str, set[str]]:
    """A sentence over all scales, and in which ways the scales go."""
    name = measure.label[:1].upper() + measure.label[1:]
    at = {scale: found for scale, values in differences.items() if (found := mean_interval(values))}
    if not at:
        return f"{name}: no two runs with the same seed were measured.", set()
    ends = [min(at), max(at)] if len(at) > 1 else [*at]
    shown = ", ".join(f"{signed_interval(at[scale])} at {size_text(scale)}" for scale in ends)
    if not any(math.isfinite(interval.low) for interval in at.values()):
        return f"{name}: {shown}; one seed each, so nothing is claimed.", set()
    ways = {scale: way(measure, interval) for scale, interval in at.items()}
    counted = []
    for which in ("better", "worse"):
        if count := sum(found == which for found in ways.values()):
            higher = (which == "better") == (measure.better == "higher")
            where = "every size" if count == len(ways) else f"{count} of {len(ways)} sizes"
            counted.append(f"{'higher' if higher else 'lower'} at {where}")
    told = " and ".join(counted) if counted else "no measurable difference at any size"
    return f"{name}: {told} ({shown}).", set(ways.values())


def _trend(measure: StudyMeasure, differences: Mapping[float, list[float]], study: Study, draws: int) -> str:
    """Whether the difference itself changes with the scale."""
    pairs = [(scale, value) for scale, values in differences.items() for value in values]
    if not pairs:
        return ""
    fit = fit_measure([scale for scale, _ in pairs], [value for _, value in pairs], draws=draws)
    if fit.verdict == "too few":
        return ""
    symbol = SYMBOLS[study.scale]
    if not fit.depends or fit.change is None:
        return f"The difference in {measure.label} {predicate(fit, symbol)}.{astray(fit)}"
    first, last = (sum(differences[scale]) / len(differences[scale]) for scale in (min(differences), max(differences)))
    what = "changes its sign" if first * last < 0 else "widens" if abs(last) > abs(first) else "narrows"
    return f"The difference in {measure.label} {what} with {symbol}: it {predicate(fit, symbol)}.{astray(fit)}"


def _summary(ways: Mapping[str, set[str]]) -> str:
    better, worse = ([name for name, found in ways.items() if which in found] for which in ("better", "worse"))
    mixed = [name for name in better if name in worse]
    parts = []
    if better:
        parts.append(f"better {_listed(better)}")
    if worse:
        parts.append(f"worse {_listed(worse)}")
    if mixed:
        parts.append(f"{_listed(mixed)} depending on the size")
    return "; ".join(parts) if parts else "no difference can be claimed"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _varies_with(study: Study, column: str) -> bool:
    """Within a series, where it cannot be told from the scale."""
    return column != study.scale and any(len({row[column] for row in series.rows}) > 1 for series in study.series)


def _of_seeds(study: Study) -> list[str]:
    """An exclude of the study, or runs that are not done, may leave some sizes fewer seeds than others."""
    of_cells: dict[tuple[int, float], set[int]] = {}
    for i, series in enumerate(study.series):
        for row in series.rows:
            of_cells.setdefault((i, row[study.scale]), set()).add(row["seed"])
    found = []
    if alone := {scale for (_, scale), seeds in of_cells.items() if len(seeds) < 2}:
        sizes = {scale for _, scale in of_cells}
        where = "every size" if alone == sizes else f"{len(alone)} of {len(sizes)} sizes"
        found.append(
            f"Some series have one seed at {where}: they have no interval there, and no difference is claimed."
        )
    counts = {len(seeds) for seeds in of_cells.values()} - {1}
    if counts and min(counts) < 5:
        found.append(
            f"Intervals rest on {min(counts)}{' or more' if len(counts) > 1 else ''} seeds a size: they are wide, and "
            "hold for seeds that scatter normally."
        )
    return found


def caveats(study: Study) -> list[str]:
    """What limits the answer."""
    found = _of_seeds(study)
    left = {state: count for state, count in study.states.items() if state != "done"}
    if left:
        listed = ", ".join(f"{count} {state}" for state, count in sorted(left.items()))
        found.append(f"Not all runs are done: {listed}. They are in no number here.")
    found += [f"{name} failed: {cause}." for name, cause in study.failed.items()]
    short = [row for row in study.rows if row["consumed_tokens"] < row["planned_tokens"]]
    if short:
        listed = ", ".join(f"{row['run']} ({row['consumed_tokens']:,} of {row['planned_tokens']:,})" for row in short)
        found.append(f"Trained on fewer tokens than planned, as steps were skipped: {listed}. D and C are as planned.")
    if len({row["vocab_size"] for row in study.rows}) > 1:
        found.append(
            "Losses are per token: those of different vocabularies are of different tokens. Bits per byte, in the "
            "records, can be compared."
        )
    others = [SYMBOLS[column] for column in study.varying_scales if _varies_with(study, column)]
    if others:
        found.append(
            f"{_listed(others)} {'varies' if len(others) == 1 else 'vary'} with {SYMBOLS[study.scale]} in this study: "
            f"what is said to depend on {SYMBOLS[study.scale]} may depend on {'it' if len(others) == 1 else 'them'}."
        )
    if any(partner(study, series) for series in study.series):
        found.append("Each interval stands alone: of twenty differences that are nothing, one leaves its interval.")
    if len({row["hardware"] for row in study.rows} - {None}) > 1:  # checkpoints of earlier versions do not tell it
        found.append("The runs were made on different hardware.")
    return found
