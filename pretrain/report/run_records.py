"""What a run left in its folder, read and checked: recipe, metrics, evaluation, arrays.

A Hugging Face folder that was evaluated has an ``evaluation.json`` whose method is null, and neither a recipe nor
metrics; it is shown beside runs with what it has.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from pretrain.errors import UserError
from pretrain.run_folder import EVALUATION_FORMAT
from pretrain.training.metrics import read_metrics

Floats = npt.NDArray[np.float64]

EVALUATION_KEYS = (
    "run", "method", "seed", "checkpoint_step", "tokens", "split", "perplexity", "unique_tokens", "unique_targets",
    "target_tokens", "sliding_window", "bits_per_byte", "isotropy", "isotropy_unit_norm", "mean_cosine", "mean_shift",
    "effective_rank", "top_singular_share", "mean_row_norm", "seen_rows", "word_similarity", "under_trained_tokens",
    "generation", "input_embedding", "parameters", "parameters_without_embeddings", "training",
)  # fmt: skip
ARRAYS = (
    "token_counts", "groups", "row_norms", "singular_values", "cosine_edges", "cosine_counts", "projection"
)  # fmt: skip
RUN_FILES = ("recipe.yaml", "metrics.jsonl")
# Entries of evaluation.json that hold others, and those that are there whatever was evaluated.
TABLES = (
    "perplexity", "unique_tokens", "unique_targets", "target_tokens", "sliding_window", "bits_per_byte", "seen_rows",
    "word_similarity", "under_trained_tokens", "generation", "input_embedding", "training",
)  # fmt: skip
NEVER_NULL = ("perplexity", "unique_tokens", "unique_targets", "target_tokens")


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

    def number(self, *path: str) -> float | None:
        """A number of ``evaluation.json``; None where it was not measured or is not a number (NaN).

        Raises:
            UserError: something else is in its place.
        """
        value = look_up(self.evaluation, path)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(
                f"{self.folder / 'evaluation.json'} is damaged: {'.'.join(path)} is {value!r}, not a number: "
                f"{_again(self.folder)}"
            )
        return float(value)

    def series(self, *path: str) -> tuple[Floats, Floats]:
        """Tokens and values of a metric at the steps where it was measured; ``path`` goes into nested records."""
        points = [(record.get("tokens"), look_up(record, path)) for record in self.metrics]
        measured = [(tokens, value) for tokens, value in points if tokens is not None and value is not None]
        both = np.asarray(measured, dtype=np.float64).reshape(-1, 2)
        return both[:, 0], both[:, 1]


def look_up(tree: Any, path: Sequence[str]) -> Any:
    """The value under nested keys, None where a key is absent."""
    for key in path:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


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
    arrays = folder / "evaluation.npz"
    return RunRecord(
        folder=folder,
        name=name,
        recipe=recipe,
        recipe_text=recipe_text,
        metrics=metrics,
        evaluation=evaluation,
        arrays=_read_arrays(arrays, whole=evaluation["method"] is not None) if recipe or arrays.is_file() else {},
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
    try:
        tree = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}: {_again(folder)}") from error
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != EVALUATION_FORMAT:
        raise UserError(f"{path} has format {found!r}, this version reads {EVALUATION_FORMAT}: {_again(folder)}")
    missing = [key for key in EVALUATION_KEYS if key not in tree]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: {_again(folder)}")
    wrong = [key for key in TABLES if not isinstance(tree[key], dict) and (tree[key] is not None or key in NEVER_NULL)]
    if wrong or not isinstance(tree["seed"], int | None):
        key = wrong[0] if wrong else "seed"
        raise UserError(f"{path} is damaged: {key} is {tree[key]!r}: {_again(folder)}")
    _check_samples(tree, path)
    if tree["method"] is not None and lacking:
        raise UserError(f"{folder} is not a run folder: it has no {lacking[0]}")
    return dict(tree)


def _check_samples(tree: dict[str, Any], path: Path) -> None:
    """Lists of tokens and of examples, which the page goes through entry by entry."""
    lists = {
        ("under_trained_tokens", "tokens"): ("id", "text", "count", "cosine"),
        ("input_embedding", "under_trained_tokens", "tokens"): ("id", "text", "count", "cosine"),
        ("generation", "examples"): ("prompt", "greedy", "sampled", "human"),
    }
    for place, keys in lists.items():
        found = look_up(tree, place)
        whole = isinstance(found, list) and all(
            isinstance(entry, dict) and set(keys) <= entry.keys() for entry in found
        )
        if found is not None and not whole:
            raise UserError(
                f"{path} is damaged: {'.'.join(place)} is no list of {', '.join(keys)}: {_again(path.parent)}"
            )


def _read_arrays(path: Path, *, whole: bool) -> dict[str, npt.NDArray[Any]]:
    """``whole``: all of :data:`ARRAYS` must be there."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {path} ({error}): {_again(path.parent)}") from error
    missing = [name for name in ARRAYS if name not in arrays]
    if missing and whole:
        raise UserError(f"{path} lacks {', '.join(missing)}: {_again(path.parent)}")
    lengths = {name: len(arrays[name]) for name in ("token_counts", "row_norms", "projection") if name in arrays}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path} is damaged: arrays of the vocabulary have {lengths} rows: {_again(path.parent)}")
    return arrays


def _again(folder: Path) -> str:
    return f"run `python -m pretrain evaluate {folder}` again"
