"""The tables of a study's page, and the tidy CSV files beside it."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

from pretrain.report.formatting import ABSENT
from pretrain.study.fit_words import SYMBOLS, decimals, in_decimals, number, over, predicate, size_text
from pretrain.study.fits import Interval
from pretrain.study.study_cells import (
    LOSS,
    MEASURES,
    Series,
    Study,
    StudyMeasure,
    cells,
    mean_interval,
    paired,
    partner,
)
from pretrain.study.study_words import Fits, signed_interval, way

Table = dict[str, Any]
HELD_OUT_NAMES = ("constant", "log-linear", "power law")


def cell_table(study: Study) -> Table:
    """Mean and interval of every measure in every cell."""
    groups = []
    for i, series in enumerate(study.series):
        columns = {measure: cells(series.rows, measure, study.scale) for measure in MEASURES}
        rows = []
        for scale, values in columns[LOSS].items():
            row = [_cell(measure, columns[measure].get(scale, [])) for measure in MEASURES]
            rows.append({"head": size_text(scale), "cells": [{"text": str(len(values)), "kind": ""}, *row]})
        groups.append({"label": series.label, "place": i, "rows": rows})
    return {
        "caption": f"Means over seeds at each {SYMBOLS[study.scale]}, with half their 95 % intervals (Student's t).",
        "heads": [SYMBOLS[study.scale], "seeds", *(_head(measure) for measure in MEASURES)],
        "words": False,
        "groups": groups,
    }


def difference_table(study: Study) -> Table | None:
    """Paired differences of every measure at every scale; None with one method."""
    groups = []
    for i, series in enumerate(study.series):
        if (base := partner(study, series)) is None:
            continue
        columns = {measure: paired(series, base, measure, study.scale) for measure in MEASURES}
        rows = []
        for scale in sorted({scale for found in columns.values() for scale in found}):
            row = [_difference_cell(measure, columns[measure].get(scale, [])) for measure in MEASURES]
            pairs = max(len(found.get(scale, [])) for found in columns.values())
            rows.append({"head": size_text(scale), "cells": [{"text": str(pairs), "kind": ""}, *row]})
        groups.append({"label": f"{series.label} less {base.label}", "place": i, "rows": rows})
    return {
        "caption": f"Differences from {study.baseline}, paired over seeds, with half their 95 % intervals. Bold: the "
        "interval leaves out zero; green is better, orange worse.",
        "heads": [SYMBOLS[study.scale], "pairs", *(_head(measure) for measure in MEASURES)],
        "words": False,
        "groups": groups,
    } if groups else None  # fmt: skip


def fit_table(study: Study, fits: Fits) -> Table:
    """What was fitted, and the held-out errors that decided."""
    groups = []
    for i, series in enumerate(study.series):
        rows = []
        for measure in MEASURES:
            fit = fits[series.label, measure.column]
            errors = fit.held_out or {}
            words = predicate(fit, SYMBOLS[study.scale])
            words = words.replace(f" over {over(fit)}", "") if fit.curves else words
            row = [{"text": words + ("*" if fit.scattered else ""), "kind": "words"}]
            for name in HELD_OUT_NAMES:
                shown = f"{number(errors[name].mean)} ({number(errors[name].largest)})" if name in errors else ABSENT
                row.append({"text": shown, "kind": ""})
            row.append({"text": str(sum(curve.failed for curve in fit.curves)) if fit.curves else ABSENT, "kind": ""})
            rows.append({"head": measure.label, "cells": row})
        groups.append({"label": series.label, "place": i, "rows": rows})
    return {
        "caption": "Fits. Constant, logarithm, power law: mean absolute error on a size that was left out, each in "
        "turn, and in brackets on the largest alone, an extrapolation. A richer curve is taken only where it errs less "
        "by more than the standard error. Failed: refits of the bootstrap that did not converge. *: the sizes lie off "
        "the curve by more than their seeds explain (F test, p < 0.01).",
        "heads": ["", f"with {SYMBOLS[study.scale]}", "constant", "logarithm", "power law", "failed"],
        "words": True,
        "groups": groups,
    }


def cell_records(study: Study) -> list[dict[str, Any]]:
    """Tidy: one row a series, scale and measure."""
    return [
        {**_what(study, series, scale, measure), "count": len(values), **_numbers(mean_interval(values))}
        for series in study.series for measure in MEASURES
        for scale, values in cells(series.rows, measure, study.scale).items()
    ]  # fmt: skip


def difference_records(study: Study) -> list[dict[str, Any]]:
    """Tidy: one row a compared series, scale and measure."""
    return [
        {
            **_what(study, series, scale, measure), "base": base.label, "count": len(values),
            **_numbers(mean_interval(values)),
        }
        for series in study.series if (base := partner(study, series))
        for measure in MEASURES for scale, values in paired(series, base, measure, study.scale).items()
    ]  # fmt: skip


def fit_records(fits_of_scale: dict[str, Fits]) -> list[dict[str, Any]]:
    """Tidy: one row a scale column, series and measure; the parameters by their letters, exponents with intervals."""
    found = []
    for scale, fits in fits_of_scale.items():
        for (label, column), fit in fits.items():
            row: dict[str, Any] = {
                "scale": scale, "series": label, "measure": column, "verdict": fit.verdict, "scales": len(fit.scales),
                "observations": len(fit.y), "dropped": fit.dropped, "astray": len(fit.astray),
                "words": predicate(fit, SYMBOLS[scale]),
            }  # fmt: skip
            row |= {key: None for key in ("form", "E", "A", "a", "b", "b_low", "b_high", "failed_refits")}
            if fit.curves:
                curve = fit.curves[0]
                row |= {"form": curve.form.name, **curve.natural(), "failed_refits": curve.failed}
                if curve.form.parameters == 3:
                    row |= {"b_low": curve.exponent.low, "b_high": curve.exponent.high}
                elif curve.form.parameters == 2:
                    slope = curve.per_doubling
                    row |= {"b_low": slope.low / math.log(2), "b_high": slope.high / math.log(2)}
            for name in HELD_OUT_NAMES:
                errors = (fit.held_out or {}).get(name)
                row[f"held_out {name}"] = errors.mean if errors else None
                row[f"held_out_largest {name}"] = errors.largest if errors else None
            found.append(row)
    return found


def as_csv(records: Sequence[dict[str, Any]]) -> str:
    """With a head line; empty without records."""
    if not records:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for record in records for key in record)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in record.items()} for record in records)
    return text.getvalue()


def _plain(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _what(study: Study, series: Series, scale: float, measure: StudyMeasure) -> dict[str, Any]:
    values = {f"axis.{name}": series.fixed.get(name) for name in _fixed_names(study.series)}
    kind = "ln " if measure.logarithm else ""
    return {
        "series": series.label,
        "method": series.method,
        **values,
        study.scale: scale,
        "measure": kind + measure.column,
    }


def _fixed_names(all_series: Iterable[Series]) -> list[str]:
    return list(dict.fromkeys(name for series in all_series for name in series.fixed))


def _numbers(interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return {"mean": None, "low": None, "high": None}
    return {"mean": interval.value, "low": interval.low, "high": interval.high}


def _head(measure: StudyMeasure) -> str:
    arrow = {"lower": "↓", "higher": "↑"}[measure.better]
    return f"{measure.label}\u00a0{arrow}"


def _cell(measure: StudyMeasure, values: list[float]) -> dict[str, str]:
    interval = mean_interval(values)
    if interval is None:
        return {"text": ABSENT, "kind": ""}
    finite = math.isfinite(interval.low)
    half = f"±{measure.show(interval.high - interval.value)}" if finite else ""
    return {"text": measure.show(interval.value), "interval": half, "kind": ""}


def _difference_cell(measure: StudyMeasure, values: list[float]) -> dict[str, str]:
    interval = mean_interval(values)
    if interval is None:
        return {"text": ABSENT, "kind": ""}
    found, finite = way(measure, interval), math.isfinite(interval.low)
    half = f"±{in_decimals(interval.high - interval.value, decimals(interval))}" if finite else ""
    text = signed_interval(interval).partition(" [")[0]
    return {"text": text, "interval": half, "kind": f"claimed {found}" if found else ""}
