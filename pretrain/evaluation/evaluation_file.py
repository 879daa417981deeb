"""``evaluation.json`` and ``evaluation.npz``: read and checked, and whether a checkpoint has them."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.checkpointing.folder import step_of
from pretrain.errors import UserError
from pretrain.files import file_sha256
from pretrain.recipe import Recipe
from pretrain.run_folder import EVALUATION_FORMAT, RunFolder

EVALUATION_KEYS = (
    "run", "method", "seed", "checkpoint_step", "tokens", "split", "perplexity", "unique_tokens", "unique_targets",
    "target_tokens", "sliding_window", "bits_per_byte", "isotropy", "isotropy_unit_norm", "mean_cosine", "mean_shift",
    "effective_rank", "top_singular_share", "mean_row_norm", "seen_rows", "word_similarity", "under_trained_tokens",
    "generation", "input_embedding", "parameters", "parameters_without_embeddings", "training",
)  # fmt: skip
ARRAYS = (
    "token_counts", "groups", "row_norms", "singular_values", "cosine_edges", "cosine_counts", "projection"
)  # fmt: skip
# Entries that hold others, and those that are there whatever was evaluated, with at least a total.
TABLES = (
    "perplexity", "unique_tokens", "unique_targets", "target_tokens", "sliding_window", "bits_per_byte", "seen_rows",
    "word_similarity", "under_trained_tokens", "generation", "input_embedding", "training",
)  # fmt: skip
NEVER_NULL = ("perplexity", "unique_tokens", "unique_targets", "target_tokens")
# Entries in which other things than numbers stand.
NOT_NUMBERS = ("format", "run", "method", "split", "under_trained_tokens", "examples", "hardware", "versions",
               "sharding", "precision", "sha256", "interval")  # fmt: skip
TOKEN_ENTRY: dict[str, type] = {"id": int, "text": str, "count": int, "cosine": float}
EXAMPLE_ENTRY: dict[str, type] = {"prompt": str, "greedy": str, "sampled": str, "human": str}


def read_evaluation(path: Path) -> dict[str, Any]:
    """``evaluation.json``, of this version and of the right types all through.

    Raises:
        UserError: it cannot be read, is of another version or damaged.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}: {again(path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}: {again(path)}") from error
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != EVALUATION_FORMAT:
        raise UserError(f"{path} has format {found!r}, this version reads {EVALUATION_FORMAT}: {again(path)}")
    missing = [key for key in EVALUATION_KEYS if key not in tree]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: {again(path)}")
    wrong = [key for key in TABLES if not isinstance(tree[key], dict) and (tree[key] is not None or key in NEVER_NULL)]
    wrong += [key for key in NEVER_NULL if key not in wrong and "total" not in tree[key]]
    if wrong or not isinstance(tree["seed"], int | None):
        key = wrong[0] if wrong else "seed"
        raise UserError(f"{path} is damaged: {key} is {tree[key]!r}: {again(path)}")
    if not isinstance(look_up(tree, ("bits_per_byte", "text_bytes")), int):
        raise UserError(
            f"{path} is damaged: bits_per_byte is {tree['bits_per_byte']!r}, without text_bytes: {again(path)}"
        )
    for where, value in _leaves(tree):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{path} is damaged: {'.'.join(where)} is {value!r}, not a number: {again(path)}")
    _check_lists(tree, path)
    return dict(tree)


def read_arrays(path: Path, needed: Sequence[str] = ARRAYS) -> dict[str, npt.NDArray[Any]]:
    """``evaluation.npz``, in which those ``needed`` must be.

    Raises:
        UserError: it cannot be read, lacks arrays, or they do not fit.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {path} ({error}): {again(path)}") from error
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: {again(path)}")
    lengths = {name: len(arrays[name]) for name in ("token_counts", "row_norms", "projection") if name in arrays}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path} is damaged: arrays of the vocabulary have {lengths} rows: {again(path)}")
    return arrays


def is_evaluated(folder: RunFolder, checkpoint: Path, recipe: Recipe) -> bool:
    """Whether its evaluation is there and whole, of this version and with the word pairs as they are now."""
    file, arrays = folder.evaluation_files(checkpoint)
    try:
        evaluation = read_evaluation(file)
        read_arrays(arrays)
    except UserError:
        return False
    if evaluation["checkpoint_step"] != step_of(checkpoint):
        return False
    measured = {name: entry.get("sha256") for name, entry in evaluation["word_similarity"].items()}
    files = [Path(name) for name in recipe.reporting.word_similarity]
    # A file that is gone since says nothing against what was measured on it.
    wanted = {file.stem: file_sha256(file) if file.is_file() else measured.get(file.stem) for file in files}
    return measured == wanted


def look_up(tree: Any, path: Sequence[str]) -> Any:
    """The value under nested keys, None where a key is absent."""
    for key in path:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def again(path: Path) -> str:
    """How to make a file of a run once more."""
    folder = path.parent.parent if path.parent.name == "evaluations" else path.parent
    if not RunFolder(folder).recipe_file.exists():  # where a published model was measured
        return f"run the `python -m pretrain evaluate HF_FOLDER --data RECIPE --output {folder}` that made it again"
    step = f" --checkpoint {step_of(path.with_suffix(''))}" if path.parent.name == "evaluations" else ""
    return f"run `python -m pretrain evaluate {folder}{step}` again"


def _leaves(tree: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What is no table, where numbers should be."""
    for key, value in tree.items():
        if key in NOT_NUMBERS:
            continue
        if isinstance(value, dict):
            yield from _leaves(value, (*place, key))
        else:
            yield (*place, key), value


def _check_lists(tree: dict[str, Any], path: Path) -> None:
    """Lists of tokens and of examples, which the page goes through entry by entry."""
    lists: dict[tuple[str, ...], dict[str, type]] = {
        ("under_trained_tokens", "tokens"): TOKEN_ENTRY,
        ("input_embedding", "under_trained_tokens", "tokens"): TOKEN_ENTRY,
        ("generation", "examples"): EXAMPLE_ENTRY,
    }
    for place, kinds in lists.items():
        found = look_up(tree, place)
        whole = isinstance(found, list) and all(
            isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
            for entry in found
        )
        if found is not None and not whole:
            raise UserError(f"{path} is damaged: {'.'.join(place)} is no list of {', '.join(kinds)}: {again(path)}")
