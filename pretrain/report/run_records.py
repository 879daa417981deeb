"""What a run left in its folder, read and checked: recipe, metrics, evaluation, arrays.

A Hugging Face folder that was evaluated has an ``evaluation.json`` whose method is null, and neither a recipe nor
metrics; it is shown beside runs with what it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from pretrain.errors import UserError
from pretrain.evaluation.evaluation_file import ARRAYS, look_up, read_arrays, read_evaluation
from pretrain.training.metrics import read_metrics

Floats = npt.NDArray[np.float64]

RUN_FILES = ("recipe.yaml", "metrics.jsonl")


@dataclass(frozen=True)
class RunRecord:
    """One evaluated run.

    Attributes:
        name: for tables and legends; unique among the runs that were read together.
        recipe: the resolved recipe as plain dicts, empty where there is none; ``recipe_text`` is the file as it is.
        metrics: one record a logged step, steps rising, each once.
        evaluation: ``evaluation.json``.
        arrays: ``evaluation.npz``: token_counts, groups, row_norms [V], singular_values [D],
            cosine_edges [B + 1], cosine_counts [B], projection [V, 2]. Without a method, some may be absent.
    """

    folder: Path
    name: str
    recipe: dict[str, Any]
    recipe_text: str
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]

    @property
    def seed(self) -> int | None:
        return None if self.evaluation["seed"] is None else int(self.evaluation["seed"])

    @property
    def last_step(self) -> int:
        """How far the metrics go; 0 without any."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def number(self, *path: str) -> float | None:
        """A number of ``evaluation.json``; None where it was not measured or is not a number (NaN)."""
        value = look_up(self.evaluation, path)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        return float(value)

    def series(self, *path: str) -> tuple[Floats, Floats]:
        """Tokens and values of a metric at the steps where it was measured."""
        points = self.points(*path)
        return points[:, 1], points[:, 2]

    def points(self, *path: str) -> Floats:
        """[n, 3]: step, tokens and value where a metric was measured; ``path`` goes into nested records."""
        points = [(record["step"], record.get("tokens"), look_up(record, path)) for record in self.metrics]
        measured = [point for point in points if None not in point]
        return np.asarray(measured, dtype=np.float64).reshape(-1, 3)


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read several runs; those of the same name are told apart by their folders.

    Raises:
        UserError: none or one twice was given, or a folder is not that of an evaluated run.
    """
    if not folders:
        raise UserError("a report needs at least one run folder")
    resolved = [folder.resolve() for folder in folders]
    for i, folder in enumerate(resolved):
        if folder in resolved[:i]:
            raise UserError(f"{folders[i]} is given twice")
    trees = [_read_evaluation(folder) for folder in folders]
    names = [str(tree["run"]) for tree in trees]
    return [
        _read_run(folder, tree, name if names.count(name) == 1 else f"{name} ({folder})")
        for folder, tree, name in zip(folders, trees, names, strict=True)
    ]


def _read_run(folder: Path, evaluation: dict[str, Any], name: str) -> RunRecord:
    recipe_text, recipe, metrics = "", dict[str, Any](), list[dict[str, Any]]()
    if evaluation["method"] is not None:
        recipe_text = _read_text(folder / "recipe.yaml")
        recipe = _read_recipe(folder / "recipe.yaml", recipe_text)
        metrics = read_metrics(folder / "metrics.jsonl")
    arrays, of_a_run = folder / "evaluation.npz", ARRAYS if evaluation["method"] is not None else ()
    return RunRecord(
        folder=folder,
        name=name,
        recipe=recipe,
        recipe_text=recipe_text,
        metrics=metrics,
        evaluation=evaluation,
        arrays=read_arrays(arrays, of_a_run) if recipe or arrays.is_file() else {},
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _read_recipe(path: Path, text: str) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} holds {type(recipe).__name__}, not a mapping of recipe keys")
    return recipe


def _read_evaluation(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation.json"
    lacking = [name for name in RUN_FILES if not (folder / name).is_file()]
    if not path.is_file():
        if lacking:
            raise UserError(f"{folder} is not a run folder: it has no {lacking[0]}")
        raise UserError(f"{folder} has not been evaluated: run `python -m pretrain evaluate {folder}` first")
    tree = read_evaluation(path)
    if tree["method"] is not None and lacking:
        raise UserError(f"{folder} is not a run folder: it has no {lacking[0]}")
    return tree
