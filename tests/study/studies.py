"""A study of small runs: the small recipe of the tests, two sizes of it, two objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pretrain.recipe import Recipe
from pretrain.recipe_io import recipe_to_dict
from tests.small_runs import change

SIZES = {"xs": {"model.hidden_size": 16}, "s": {"model.hidden_size": 32}}
OBJECTIVES = {"plain": {"objective.method": "mle"}, "agg": {"objective.method": "agg"}}


def write_study(folder: Path, recipe: Recipe, *, recipe_sections: dict[str, Any] | None = None, **keys: Any) -> str:
    """``folder/study.yaml`` over ``folder/base.yaml``; runs go to ``folder/out/small``."""
    base = folder / "base.yaml"
    changed = change(recipe, device="cpu", **(recipe_sections or {}))
    base.write_text(yaml.safe_dump(recipe_to_dict(changed)), encoding="utf-8")
    tree = {
        "name": "small",
        "question": "What is small?",
        "base": str(base),
        "output_root": str(folder / "out"),
        "axes": {"size": SIZES, "objective": OBJECTIVES, "seed": [1, 2]},
    } | keys
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return str(path)
