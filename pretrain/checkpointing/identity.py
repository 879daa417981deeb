"""What a checkpoint must share with the run that loads it; light to import, as it is asked before ranks start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import CheckpointError
from pretrain.recipe import ModelRecipe, ObjectiveRecipe, OptimizerRecipe, Recipe
from pretrain.recipe_io import flatten, recipe_to_dict

if TYPE_CHECKING:
    from pretrain.data.prepared import PreparedData

CHANGEABLE = ("data_sha256", "tokenizer_sha256", "optimizer.")  # where a run goes on, if that is asked for
NOT_OF_WEIGHTS = ("data_sha256", "optimizer.")  # what only uses them does not mind


def identity_of(recipe: Recipe, prepared: PreparedData) -> dict[str, Any]:
    """Hashes, and the settings behind the recipe's."""
    tree = recipe_to_dict(recipe)
    del tree["model"]["init_from"]  # where the first weights came from; the checkpoint has newer ones
    settings = {section: tree[section] for section in ("model", "optimizer", "objective")}
    return {
        "data_sha256": prepared.sha256,
        "tokenizer_sha256": prepared.tokenizer.sha256,
        "vocab_size": prepared.vocab_size,
        **settings,
    }


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
    there.pop("recipe_sha256", None)  # of what is compared one by one; earlier versions saved it
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
