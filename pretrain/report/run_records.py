"""What a run left in its folder, read and checked: recipe, metrics, evaluation, arrays."""

from __future__ import annotations

import json
import zipfile
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
    "run", "method", "checkpoint_step", "tokens", "split", "perplexity", "unique_tokens", "unique_targets",
    "target_tokens", "isotropy", "isotropy_unit_norm", "mean_cosine", "mean_shift", "effective_rank",
    "top_singular_share", "mean_row_norm", "seen_rows", "word_similarity", "parameters",
    "parameters_without_embeddings", "training",
)  # fmt: skip
ARRAYS = (
    "token_counts", "groups", "row_norms", "singular_values", "cosine_edges", "cosine_counts", "projection"
)  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """One evaluated run.

    Attributes:
        name: for tables and legends; unique among the runs that were read together.
        recipe: the resolved recipe as plain dicts; ``recipe_text`` is the file as it is.
        metrics: one record a logged step, steps rising, each once.
        evaluation: ``evaluation.json``.
        arrays: ``evaluation.npz``: token_counts, groups, row_norms [V], singular_values [D],
            cosine_edges [B + 1], cosine_counts [B], projection [V, 2].
    """

    folder: Path
    name: str
    recipe: dict[str, Any]
    recipe_text: str
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]

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
    recipe_text = _read_text(folder / "recipe.yaml")
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError as error:
        raise UserError(f"{folder / 'recipe.yaml'} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{folder / 'recipe.yaml'} holds {type(recipe).__name__}, not a mapping of recipe keys")
    return RunRecord(
        folder=folder,
        name=name,
        recipe=recipe,
        recipe_text=recipe_text,
        metrics=read_metrics(folder / "metrics.jsonl"),
        evaluation=evaluation,
        arrays=_read_arrays(folder / "evaluation.npz"),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _read_evaluation(folder: Path) -> dict[str, Any]:
    for name in ("recipe.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is not a run folder: it has no {name}")
    path = folder / "evaluation.json"
    if not path.is_file():
        raise UserError(f"{folder} has not been evaluated: run `python -m pretrain evaluate {folder}` first")
    try:
        tree = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != EVALUATION_FORMAT:
        raise UserError(
            f"{path} has format {found!r}, this version reads {EVALUATION_FORMAT}: "
            f"run `python -m pretrain evaluate {folder}` again"
        )
    missing = [key for key in EVALUATION_KEYS if key not in tree]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: run `python -m pretrain evaluate {folder}` again")
    return dict(tree)


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    again = f"run `python -m pretrain evaluate {path.parent}` again"
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path} ({error}): {again}") from error
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: {again}")
    return arrays
