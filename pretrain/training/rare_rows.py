"""How the rows of rare tokens are treated, and when: the experiments behind the method (arXiv 2109.03127, section 3).

With respect to a rare row the gradient of the loss has three parts: (a) of the positions whose target it is, (b) of
those whose target is not rare, (c) of those whose target is another rare token. g1 gates (b) and g2 gates (c).
"""

from __future__ import annotations

import dataclasses

import torch

from agg import Gates
from pretrain.recipe import ObjectiveRecipe


def treatment_at(recipe: ObjectiveRecipe, step: int) -> str:
    """``gate``, ``block``, ``freeze`` or ``train`` at ``step``, the first being 1."""
    if recipe.switch_step is None or step < recipe.switch_step:
        return recipe.rare_rows
    assert recipe.rare_rows_after is not None
    return recipe.rare_rows_after


def ever_frozen(recipe: ObjectiveRecipe) -> bool:
    return "freeze" in (recipe.rare_rows, recipe.rare_rows_after)


def treated(gates: Gates, treatment: str, acting: str) -> Gates:
    """The same rare rows with the gates of a treatment; ``acting`` is ``both``, or the only gate that is not open."""
    if treatment in ("gate", "freeze") and acting == "both":
        return gates
    opened = torch.ones_like(gates.g1)
    if treatment == "train":
        return dataclasses.replace(gates, g1=opened, g2=opened)
    closed = opened.masked_fill(gates.rare, 0)
    g1, g2 = (closed, closed) if treatment == "block" else (gates.g1, gates.g2)
    return dataclasses.replace(gates, g1=opened if acting == "g2" else g1, g2=opened if acting == "g1" else g2)
