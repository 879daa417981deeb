"""The records of a study, checked and put in order: series of runs over a scale, cells of seeds, paired differences.

A *series* is what one line of a figure shows: a method and one value of every other axis that varies within it. A
*cell* is a series at one scale: its seeds. Two runs are a *pair* when they differ in nothing but the method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from scipy import stats

from pretrain.errors import UserError
from pretrain.report.formatting import compact, fixed, grouped
from pretrain.study.fit_forms import LOG_LINEAR
from pretrain.study.fits import CONFIDENCE, Interval
from pretrain.study.state import RunState

RECORDS_FORMAT = 1
Row = Mapping[str, Any]
SCALE_COLUMNS = ("parameters_without_embeddings", "vocab_size", "planned_tokens", "flops")
FOLLOWS = "flops"  # from the others: where two of them vary, it would mix what they do
COLUMNS = (
    "format", "study", "run", "state", "method", "seed", "step", "consumed_tokens", *SCALE_COLUMNS, "parameters",
    "hardware", "commit", "recipe_sha256",
)  # fmt: skip
PLAIN = ("plain", "mle")  # labels of the method that others are compared with


@dataclass(frozen=True)
class StudyMeasure:
    """A measure of the records.

    Attributes:
        label: as the subject of a sentence and the head of a column.
        column: without "measure."; ``logarithm``: its natural logarithm is what is looked at, a loss in nats.
        better: which way; ``degeneration``: it says how degenerate the embedding is.
    """

    label: str
    column: str
    better: Literal["lower", "higher"]
    show: Callable[[float], str] = fixed
    logarithm: bool = False
    degeneration: bool = False

    def value(self, row: Row) -> float:
        """NaN where it was not measured, or is not finite."""
        found = row[f"measure.{self.column}"]
        if found is None or not math.isfinite(found) or (self.logarithm and found <= 0):
            return math.nan
        return math.log(found) if self.logarithm else float(found)


LOSS = StudyMeasure("loss of all tokens", "perplexity.total", "lower", logarithm=True)
RARE_LOSS = StudyMeasure("loss of rare tokens", "perplexity.rare", "lower", logarithm=True)
ISOTROPY = StudyMeasure("isotropy", "isotropy", "higher", degeneration=True)
MEAN_SHIFT = StudyMeasure("mean shift", "mean_shift", "lower", degeneration=True)
MEASURES = (
    LOSS,
    StudyMeasure("loss of frequent tokens", "perplexity.frequent", "lower", logarithm=True),
    StudyMeasure("loss of medium tokens", "perplexity.medium", "lower", logarithm=True),
    RARE_LOSS,
    ISOTROPY,
    StudyMeasure("isotropy of seen rows", "seen_rows.isotropy", "higher", degeneration=True),
    MEAN_SHIFT,
    StudyMeasure("effective rank", "effective_rank", "higher", compact, degeneration=True),
    StudyMeasure("distinct rare tokens", "unique_tokens.rare", "higher", grouped),
)


@dataclass(frozen=True)
class Series:
    """Attributes: fixed: the axes beside the method, with their value in this series; rows: of all scales and seeds."""

    label: str
    method: str
    fixed: Mapping[str, Any]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Study:
    """Attributes:
    rows: one a done run, its last checkpoint; checkpoints: all of them; states: how many runs are in which.
    failed: run -> why.
    axes: name -> its different values, those that vary; scale: the column that figures have on their x axis.
    """

    name: str
    rows: tuple[Row, ...]
    checkpoints: tuple[Row, ...]
    states: Mapping[str, int]
    axes: Mapping[str, list[Any]]
    scale: str
    series: tuple[Series, ...]
    failed: Mapping[str, str]

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        methods = list(dict.fromkeys(series.method for series in self.series))
        return next((method for method in methods if method in PLAIN), methods[0])

    @property
    def varying_scales(self) -> list[str]:
        return [column for column in SCALE_COLUMNS if _varies(self.rows, column)]

    def series_over(self, scale: str) -> tuple[Series, ...]:
        """As ``series``, for another scale: what else varies, and does not follow from it, sets series apart."""
        return _series(self.rows, self.axes, scale)


def read_study(table: pa.Table | Sequence[Row], runs: Mapping[str, RunState] | None = None) -> Study:
    """Check the records and put them in order.

    Args:
        runs: all that the study plans; None: those of the records.

    Raises:
        UserError: they have another format, lack a column or a measure, or hold no done run.
    """
    rows: list[Row] = list(table.to_pylist() if isinstance(table, pa.Table) else table)
    # records of before have one column of tokens
    rows = [{"planned_tokens": row.get("consumed_tokens"), **row} for row in rows]
    if not rows:
        raise UserError("the study has no records yet: run `python -m pretrain study` on its file first")
    _check(rows)
    last: dict[str, Row] = {}
    for row in rows:
        if row["run"] not in last or (row["step"] or 0) >= (last[row["run"]]["step"] or 0):
            last[row["run"]] = row
    found = [row["state"] for row in last.values()] if runs is None else [run.state for run in runs.values()]
    states = {state: found.count(state) for state in dict.fromkeys(found)}
    done = tuple(row for row in last.values() if row["state"] == "done")
    if not done:
        held = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        raise UserError(f"no run of the study {rows[0]['study']!r} is done ({held}): run the study again to go on")
    axes = _varying_axes(done)
    failed = {name: run.cause for name, run in (runs or {}).items() if run.state == "failed"}
    scale = _scale(done, axes)
    checkpoints = tuple(row for row in rows if row["state"] == "done")
    return Study(str(done[0]["study"]), done, checkpoints, states, axes, scale, _series(done, axes, scale), failed)


def _check(rows: Sequence[Row]) -> None:
    formats = sorted({str(row.get("format")) for row in rows})
    if formats != [str(RECORDS_FORMAT)]:
        raise UserError(
            f"the study's records have format {' and '.join(formats)}, this version reads {RECORDS_FORMAT}: "
            "collect them again with `python -m pretrain study` of this version"
        )
    present = set().union(*rows)
    missing = [column for column in COLUMNS if column not in present]
    if missing:
        raise UserError(f"the study's records lack the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    unmeasured = [measure.column for measure in MEASURES if f"measure.{measure.column}" not in present]
    if unmeasured:
        raise UserError(
            f"the study's records lack the measure{'s' if len(unmeasured) > 1 else ''} {', '.join(unmeasured)}: "
            "evaluate its runs again with `python -m pretrain evaluate`, then run the study again to collect them"
        )


def _varying_axes(rows: Sequence[Row]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys(key for row in rows for key in row if key.startswith("axis.")))
    values = {name.removeprefix("axis."): _ordered([row.get(name) for row in rows]) for name in names}
    return {name: found for name, found in values.items() if len(found) > 1}


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Each once: numbers rising, texts as they come."""
    different = [value for value in dict.fromkeys(values) if value is not None]
    return different if any(isinstance(value, str) for value in different) else sorted(different)


def _scale(rows: Sequence[Row], axes: Mapping[str, list[Any]]) -> str:
    """Of those that vary: one that can be fitted, if possible with no other along it, and has the most values."""
    varying = [column for column in SCALE_COLUMNS if _varies(rows, column)]
    own = [column for column in varying if column != FOLLOWS]

    def worth(scale: str) -> tuple[int, bool, int]:
        series = _series(rows, axes, scale)
        count = max(len({row[scale] for row in one.rows}) for one in series)
        mixed = any(_varies(one.rows, column) for one in series for column in own if column != scale)
        return min(count, LOG_LINEAR.fewest), not mixed, count

    return max(own, key=worth) if own else next(iter(varying), SCALE_COLUMNS[0])


def _varies(rows: Sequence[Row], column: str) -> bool:
    return len({row[column] for row in rows}) > 1


def _series(rows: Sequence[Row], axes: Mapping[str, list[Any]], scale: str) -> tuple[Series, ...]:
    """One for each method and value of the axes that neither the scale, the seed nor the method decides.

    An axis that the scale decides sets series apart where another scale would hide in this one without it.
    """
    names, own = [f"axis.{name}" for name in axes], list[str]()
    for axis in names:
        if _decides(rows, ("method",), axis) or _decides(rows, ("seed",), axis):
            continue
        if not _decides(rows, ("method", scale), axis) or _hides(rows, names, axis, scale, own):
            own.append(axis)
    parts: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        parts.setdefault((row["method"], *(row.get(axis) for axis in own)), []).append(row)
    found = []
    for (method, *values), members in parts.items():
        varying = {
            axis.removeprefix("axis."): value for axis, value in zip(own, values, strict=True)
            if len({row.get(axis) for row in rows if row["method"] == method}) > 1
        }  # fmt: skip
        words = [method, *(f"{name.replace('_', ' ')} {value}" for name, value in varying.items())]
        members.sort(key=lambda row: (row[scale], row["seed"]))
        found.append(Series(", ".join(words), method, varying, tuple(members)))
    order = {method: i for i, method in enumerate(dict.fromkeys(row["method"] for row in rows))}
    places = {name: {value: i for i, value in enumerate(values)} for name, values in axes.items()}

    def place(series: Series) -> tuple[bool, int, list[int]]:
        of_axes = [places[name].get(value, -1) for name, value in series.fixed.items()]
        return series.method not in PLAIN, order[series.method], of_axes

    return tuple(sorted(found, key=place))


def _hides(rows: Sequence[Row], axes: Iterable[str], axis: str, scale: str, own: Sequence[str]) -> bool:
    """Whether what an axis does to another scale would be said of this one, which decides it.

    As with sizes at several tokens per parameter: each amount of tokens is of one size, but a size has several of them.

    Args:
        own: the axes that set series apart already.
    """
    within = ("method", *own)
    if _decides(rows, (*within, axis), scale):
        return False
    rest = ("method", *(other for other in axes if other != axis))
    others = [column for column in SCALE_COLUMNS if column not in (scale, FOLLOWS) and _varies(rows, column)]
    hidden = [column for column in others if not _decides(rows, (*within, column), scale)]
    return any(_decides(rows, ("method", axis), column) or not _decides(rows, rest, column) for column in hidden)


def _decides(rows: Sequence[Row], keys: Sequence[str], column: str) -> bool:
    """Whether rows that agree in ``keys`` agree in ``column``."""
    seen: dict[tuple[Any, ...], set[Any]] = {}
    for row in rows:
        seen.setdefault(tuple(row.get(key) for key in keys), set()).add(row.get(column))
    return all(len(values) == 1 for values in seen.values())


def observations(rows: Sequence[Row], measure: StudyMeasure, scale: str) -> tuple[list[float], list[float]]:
    """Scales and values, one each a run."""
    return [float(row[scale]) for row in rows], [measure.value(row) for row in rows]


def cells(rows: Sequence[Row], measure: StudyMeasure, scale: str) -> dict[float, list[float]]:
    """Scale -> the finite values of its seeds, scales rising."""
    found: dict[float, list[float]] = {}
    for x, y in sorted(zip(*observations(rows, measure, scale), strict=True), key=lambda pair: pair[0]):
        found.setdefault(x, [])
        if math.isfinite(y):
            found[x].append(y)
    return found


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Mean and Student's 95 % interval; None with no value, NaN ends with one: a single seed has no interval."""
    if not values:
        return None
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def partner(study: Study, series: Series) -> Series | None:
    """The series of the baseline that a series is compared with: equal in all axes that vary within the baseline."""
    if series.method == study.baseline:
        return None
    plain = [other for other in study.series if other.method == study.baseline]
    here = series.rows[0]  # ``fixed`` lacks an axis of which this method has one value alone
    return next((one for one in plain if all(here.get(f"axis.{k}") == v for k, v in one.fixed.items())), None)


def paired(series: Series, base: Series, measure: StudyMeasure, scale: str) -> dict[float, list[float]]:
    """Scale -> differences (series less base) of the runs with the same seed, where both were measured."""
    known = {(row[scale], row["seed"]): measure.value(row) for row in base.rows}
    found: dict[float, list[float]] = {}
    for row in series.rows:
        difference = measure.value(row) - known.get((row[scale], row["seed"]), math.nan)
        if math.isfinite(difference):
            found.setdefault(float(row[scale]), []).append(difference)
    return dict(sorted(found.items()))
