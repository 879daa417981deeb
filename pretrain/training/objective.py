"""What is minimised: the plain cross-entropy, or the same with Adaptive Gradient Gating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from agg import AdaptiveGradientGating, VocabShard, gated_linear_cross_entropy
from pretrain.recipe import ObjectiveRecipe


class PlainObjective:
    """Maximum likelihood; counts nothing."""

    def __init__(self, shard: VocabShard, label_smoothing: float) -> None:
        self._shard, self._label_smoothing = shard, label_smoothing

    def begin_step(self, targets: torch.Tensor) -> None:
        """Nothing to count."""

    def undo_step(self) -> None:
        """Take the counts of this step back: it is not trained on."""

    def loss(self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Sum over the valid targets: hidden [T, D], weight [V_local, D], target [T] to []."""
        return gated_linear_cross_entropy(
            hidden, weight, target, None, self._shard, reduction="sum", label_smoothing=self._label_smoothing
        )

    def rare_fraction(self) -> float | None:
        """Share of the vocabulary whose gradient is gated; None: nothing is."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        pass


class GatedObjective(PlainObjective):
    """AGG over the global batch: counts cover all data-parallel ranks and all micro-batches of a step."""

    def __init__(self, module: AdaptiveGradientGating) -> None:
        super().__init__(module.shard, module.label_smoothing)
        self.module = module

    def begin_step(self, targets: torch.Tensor) -> None:
        """Count all of this rank's targets of the coming optimizer step."""
        self.module.begin_step(targets)

    def undo_step(self) -> None:
        self.module.undo_step()

    def loss(self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.module(hidden, weight, target, reduction="sum")
        return loss

    def rare_fraction(self) -> float | None:
        shard = self.module.shard
        rare = shard.all_reduce(self.module.current_gates().rare.sum())
        return int(rare) / shard.vocab_size

    def state_dict(self) -> dict[str, Any]:
        return self.module.frequency.state_dict()

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        self.module.set_extra_state(state)


def build_objective(
    recipe: ObjectiveRecipe,
    shard: VocabShard,
    *,
    special_ids: Sequence[int],
    token_counts: np.ndarray[Any, np.dtype[np.int64]],
    steps_per_epoch: int,
    data_parallel_group: dist.ProcessGroup | None,
) -> PlainObjective:
    """
    Args:
        special_ids: bos, eos, pad, unk: never rare.
        token_counts: int64 [V], of the train shards; tells the ids that never occur.
        steps_per_epoch: the window if the recipe gives none.
    """
    if recipe.method == "mle":
        return PlainObjective(shard, recipe.label_smoothing)
    excluded = list(special_ids)
    if recipe.never_seen == "exclude":
        excluded += np.flatnonzero(token_counts == 0).tolist()
    return GatedObjective(
        AdaptiveGradientGating(
            shard,
            alpha=recipe.effective_alpha,
            rare_fraction=recipe.rare_fraction,
            window=recipe.window,
            window_steps=recipe.window_steps or steps_per_epoch,
            reference_batch_tokens=recipe.reference_batch_tokens,
            excluded_ids=excluded,
            data_parallel_group=data_parallel_group,
            label_smoothing=recipe.label_smoothing,
        )
    )
