"""Axes of a study: how they may be written, their points, and what leaves combinations of points out."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pretrain.recipe_io import flatten, nearest

RESERVED = ("recipes", "logs", "figures", "aside")  # folders beside those of the runs
OF_THE_STUDY = ("name", "output_root")  # each run has its own, by its place in the study
TOKENS, TOKENS_PER_PARAMETER = "tokens", "tokens_per_parameter"
AMOUNTS = (TOKENS, TOKENS_PER_PARAMETER)  # what a point may set beside recipe keys, and what batch.train_steps follows
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=]*")


@dataclass(frozen=True)
class Point:
    """One place on an axis.

    Attributes:
        name: its part of a run's name. label: what tables and records call it.
        changes: recipe keys, or one of AMOUNTS, and their values.
    """

    name: str
    label: str | int | float
    changes: dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid."""

    name: str
    points: tuple[Point, ...]

    @property
    def keys(self) -> set[str]:
        """All that a point of it sets."""
        return {key for point in self.points for key in point.changes}


def read_axis(name: str, entry: Any, known: dict[str, Any], problems: list[str]) -> Axis | None:
    """One of three forms: named points, ``{key, values}``, or a list of values of the key that the name says.

    Args:
        known: keys of recipes.
    """
    where, key = f"axes.{name}", None
    if not PLAIN_NAME.fullmatch(name):
        problems.append(f"{where}: an axis needs a plain name of letters, digits and ._+=")
    if isinstance(entry, list):
        key, values = _key_named(name, known, problems), entry
        if key is None:
            return None
    elif isinstance(entry, dict) and set(entry) == {"key", "values"}:
        key, values = str(entry["key"]), entry["values"]
    if key is not None:
        check_keys([key], [*known, *AMOUNTS], where, problems)
        points = tuple(_value_point(name, key, value) for value in values) if isinstance(values, list) else ()
    elif isinstance(entry, dict) and all(isinstance(point, dict) for point in entry.values()):
        points = tuple(Point(str(point), str(point), flatten(changes)) for point, changes in entry.items())
        for point in points:
            check_keys(point.changes, [*known, *AMOUNTS], f"{where}.{point.name}", problems)
    else:
        problems.append(f"{where} is {entry!r}, must be named points, a list of values, or {{key: ..., values: [...]}}")
        return None
    if not points:
        problems.append(f"{where} is empty: an axis needs at least one point")
    names = [point.name for point in points]
    problems += [f"{where}: {one!r} is there twice" for one in sorted({one for one in names if names.count(one) > 1})]
    problems += [
        f"{where}: {one.name!r} and {other.name!r} are the same: leave one out"
        for i, one in enumerate(points) for other in points[i + 1 :]
        if one.name != other.name and one.changes == other.changes
    ]  # fmt: skip
    for one in names:
        if not PLAIN_NAME.fullmatch(one.replace("-", "_")) or one in RESERVED:
            problems.append(
                f"{where}: {one!r} cannot be part of a folder's name; give it another one, as in {{a: ...}}"
            )
    return Axis(name, points)


def _value_point(axis: str, key: str, value: Any) -> Point:
    value = _as_number(value)
    if isinstance(value, str):
        return Point(value, value, {key: value})
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Point(f"{axis}{value}", value if is_number else str(value), {key: value})


def _as_number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _key_named(name: str, known: dict[str, Any], problems: list[str]) -> str | None:
    """``seed`` is seed, ``alpha`` is objective.alpha; a name that two sections have must be given with its section."""
    found = [key for key in (*known, *AMOUNTS) if key == name or key.endswith(f".{name}")]
    if name in found:
        return name
    if len(found) > 1:
        problems.append(f"axes.{name} may be {' or '.join(found)}: write {{key: {found[0]}, values: [...]}}")
    elif not found:
        leaves = {key.rpartition(".")[2]: key for key in (*known, *AMOUNTS)}
        problems.append(f"axes.{name} is a list of values, but no recipe key has this name{nearest(name, leaves)}")
    return found[0] if len(found) == 1 else None


def check_keys(changes: Collection[str], known: Collection[str], where: str, problems: list[str]) -> None:
    """Each must be a key of recipes, and not one that the study decides."""
    for key in changes:
        if key in OF_THE_STUDY:
            problems.append(f"{where}: {key} is the study's own and cannot be set for its runs")
        elif key not in known:
            problems.append(f"{where}: unknown key {key}{nearest(str(key), known)}")


def read_exclusion(
    place: int, entry: Any, axes: dict[str, Axis], problems: list[str]
) -> dict[str, tuple[str | int | float, ...]]:
    """Axis -> labels of one entry of ``exclude``, which may give one point or a list of them."""
    where = f"exclude[{place}]"
    if not isinstance(entry, dict) or not entry:
        problems.append(f"{where} is {entry!r}, must name axes and their points, as in {{size: s, seed: [2, 3]}}")
        return {}
    matches: dict[str, tuple[str | int | float, ...]] = {}
    for name, given in entry.items():
        if name not in axes:
            hint = nearest(str(name), axes) or f"; there are: {', '.join(axes)}"
            problems.append(f"{where}: unknown axis {name}{hint}")
            continue
        labels = {str(point.label): point.label for point in axes[name].points}
        chosen = [str(_as_number(value)) for value in (given if isinstance(given, list) else [given])]
        problems += [
            f"{where}: axis {name} has no point {value}; it has {', '.join(labels)}"
            for value in chosen
            if value not in labels
        ]
        if not chosen:
            problems.append(f"{where}: {name} is an empty list, must name points of the axis")
        matches[name] = tuple(labels[value] for value in chosen if value in labels)
    return matches
