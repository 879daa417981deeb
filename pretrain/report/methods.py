"""Runs that are the same but for the seed form one method."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.recipe import DataRecipe, Recipe
from pretrain.recipe_io import flatten, recipe_to_dict
from pretrain.report.run_records import Floats, RunRecord
from pretrain.run_folder import FREE_KEYS, FREE_SECTIONS

# Keys of a recipe that may differ within a method: as in a run that goes on, but for what is done about spikes.
NOT_SETTINGS = ("name", "seed", *FREE_KEYS, *(section for section in FREE_SECTIONS if section != "spikes"))


@dataclass(frozen=True)
class Curve:
    """A metric while training: means over the seeds at each step, lowest and highest of them. All arrays [n]."""

    tokens: Floats
    mean: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Method:
    """Runs of one recipe with different seeds, or one run.

    Attributes:
        name: for tables and legends; unique among the methods of a report.
        records: in the order they were given.
    """

    name: str
    records: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        return self.records[0]

    @property
    def seeds(self) -> list[int]:
        return [record.seed for record in self.records if record.seed is not None]

    def curve(self, *path: str) -> Curve:
        """A metric at the steps where all runs have it: their tokens may differ there, as a skipped step has none."""
        runs = [record.points(*path) for record in self.records]
        steps = runs[0][:, 0]
        for others in runs[1:]:
            steps = np.intersect1d(steps, others[:, 0])
        _, tokens, values = np.array([points[np.isin(points[:, 0], steps)] for points in runs]).transpose(2, 0, 1)
        return Curve(tokens.mean(axis=0), values.mean(axis=0), values.min(axis=0), values.max(axis=0))

    def last(self, key: str) -> dict[str, list[float]]:
        """A nested metric where it was last measured: of each part, one value a run that has it."""
        found: dict[str, list[float]] = {}
        for record in self.records:
            measured = [entry[key] for entry in record.metrics if isinstance(entry.get(key), dict)]
            for part, value in (measured[-1] if measured else {}).items():
                if isinstance(value, (int, float)):
                    found.setdefault(part, []).append(float(value))
        return found


def group_runs(records: Sequence[RunRecord]) -> list[Method]:
    """Methods in the order of their first runs. A seed that a method already has begins another one."""
    groups: list[tuple[str, list[RunRecord]]] = []
    for record in records:
        key = _key(record)
        for known, members in groups:
            if known == key and record.seed is not None and record.seed not in [member.seed for member in members]:
                members.append(record)
                break
        else:
            groups.append((key, [record]))
    names = _names([members for _, members in groups])
    return [Method(name, tuple(members)) for name, (_, members) in zip(names, groups, strict=True)]


def repeated_seeds(methods: Sequence[Method]) -> list[tuple[Method, Method]]:
    """Methods with the same settings, and so with a seed in common."""
    keys = [_key(method.first) if method.seeds else None for method in methods]
    return [
        (methods[keys.index(key)], method)
        for i, (method, key) in enumerate(zip(methods, keys, strict=True))
        if key is not None and keys.index(key) < i
    ]


def settings(record: RunRecord) -> dict[str, Any]:
    """What makes the method: dotted keys of the recipe but :data:`NOT_SETTINGS`; keys newer than the run: defaults."""
    defaults = flatten(recipe_to_dict(Recipe(name="", data=DataRecipe(folder="")))) if record.recipe else {}
    return {
        key: value
        for key, value in (defaults | flatten(record.recipe)).items()
        if not any(key == free or key.startswith(free + ".") for free in NOT_SETTINGS)
    }


def settings_that_differ(method: Method, base: Method) -> dict[str, Any]:
    """The values of ``method`` that ``base`` has otherwise."""
    here, there = settings(method.first), settings(base.first)
    return {key: value for key, value in here.items() if value != there.get(key)}


def _key(record: RunRecord) -> str:
    """Equal for runs that differ by nothing but the seed, evaluated at the same step on the same targets."""
    measured = [record.evaluation[key] for key in ("method", "split", "checkpoint_step", "target_tokens")]
    return json.dumps([settings(record), measured], sort_keys=True, default=str)


def _names(groups: Sequence[Sequence[RunRecord]]) -> list[str]:
    names = [_common_name(members) for members in groups]
    return [
        name if names.count(name) == 1 else f"{name} ({members[0].folder})"
        for name, members in zip(names, groups, strict=True)
    ]


def _common_name(members: Sequence[RunRecord]) -> str:
    """What the names of the runs have in common, without the seed: ``agg`` of ``agg-seed1`` and ``agg-seed2``."""
    if len(members) == 1:
        return members[0].name
    given = [str(record.evaluation["run"]) for record in members]
    without = {
        re.sub(rf"[-_.,/ ]*(seed|s)?[-_= ]*0*{record.seed}$", "", name, flags=re.IGNORECASE)
        for name, record in zip(given, members, strict=True)
    }
    for candidates in (set(given), without):
        if len(candidates) == 1 and (name := candidates.pop()):
            return name
    return f"{given[0]} and {len(given) - 1} more"
