"""What a checkpoint must share with the run that loads it; light to import, as it is asked before ranks start."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpointing.folder import problems_of, read_manifest
from pretrain.errors import CheckpointError
from pretrain.recipe import ModelRecipe, ObjectiveRecipe, OptimizerRecipe, Recipe
from pretrain.recipe_io import flatten, recipe_to_dict

if TYPE_CHECKING:
    from pretrain.data.prepared import PreparedData

CHANGEABLE = ("data_sha256", "tokenizer_sha256", "optimizer.")  # where a run goes on, if that is asked for
# Of the model: where its first weights came from (the checkpoint has newer ones), and what only saves memory.
NOT_COMPARED = ("init_from", "activation_checkpointing")
NOT_OF_WEIGHTS = ("data_sha256", "optimizer.")  # what only uses them does not mind


def identity_of(recipe: Recipe, prepared: PreparedData) -> dict[str, Any]:
    """Hashes, and the settings behind the recipe's."""
    tree = recipe_to_dict(recipe)
    settings = {section: tree[section] for section in ("model", "optimizer", "objective")}
    settings["model"] = {key: value for key, value in tree["model"].items() if key not in NOT_COMPARED}
    return {
        "data_sha256": prepared.sha256,
        "tokenizer_sha256": prepared.tokenizer.sha256,
        "vocab_size": prepared.vocab_size,
        **settings,
    }


def check_newest(checkpoints: Sequence[Path], recipe: Recipe, prepared: PreparedData, *, allow_changes: bool) -> None:
    """Of the checkpoint that a training goes on from, before anything is written; by sizes, as hashing takes long.

    Args:
        checkpoints: the newest first.
        allow_changes: data, tokenizer and optimizer may be others.

    Raises:
        CheckpointError: it is of another run.
    """
    newest = next((path for path in checkpoints if not problems_of(path, hashed=False)), None)
    if newest is not None:
        free = CHANGEABLE if allow_changes else ()
        check_identity(newest, read_manifest(newest), identity_of(recipe, prepared), free)


def check_identity(checkpoint: Path, manifest: dict[str, Any], now: dict[str, Any], free: tuple[str, ...] = ()) -> None:
    """
    Args:
        manifest: of the checkpoint.
        now: the identity of the run that is to load it.
        free: beginnings of keys that may differ.

    Raises:
        CheckpointError: it is of another run, with the keys that differ.
    """
    here = flatten(now)
    defaults = {key: value for key, value in _settings_by_default().items() if key in here}
    there = defaults | flatten(manifest["identity"])
    for key in ("recipe_sha256", *(f"model.{name}" for name in NOT_COMPARED)):
        there.pop(key, None)  # earlier versions saved it
    keys = [key for key in sorted(there.keys() | here.keys()) if not key.startswith(free)]
    different = [key for key in keys if there.get(key) != here.get(key)]
    if different:
        words = "; ".join(f"{key}: saved with {there.get(key)}, now {here.get(key)}" for key in different)
        may_change = not free and all(key.startswith(CHANGEABLE) for key in different)
        way_out = ". --allow-changes of train goes on from it" if may_change else ""
        raise CheckpointError(f"{checkpoint} is of another run ({words}){way_out}")


def _settings_by_default() -> dict[str, Any]:
    """What a checkpoint of an earlier version, which did not have a setting yet, was trained with."""
    sections = {"model": ModelRecipe, "optimizer": OptimizerRecipe, "objective": ObjectiveRecipe}
    return {
        f"{name}.{field.name}": list(field.default) if isinstance(field.default, tuple) else field.default
        for name, section in sections.items()
        for field in dataclasses.fields(section)
        if field.default is not dataclasses.MISSING
    }
