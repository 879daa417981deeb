"""What is minimised: the cross-entropy, with or without Adaptive Gradient Gating, and what may be added to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from agg import AdaptiveGradientGating, Gates, LossProbe, VocabShard, gated_linear_cross_entropy
from pretrain.recipe import ObjectiveRecipe
from pretrain.training.penalties import cosine_penalty, mean_penalty
from pretrain.training.rare_rows import treated, treatment_at


class PlainObjective:
    """Maximum likelihood; counts nothing.

    Args:
        soft_cap: of logits, see :func:`agg.gated_linear_cross_entropy`.
    """

    def __init__(self, recipe: ObjectiveRecipe, shard: VocabShard, soft_cap: float = 0.0) -> None:
        self._recipe, self._shard, self._soft_cap = recipe, shard, soft_cap
        self.probe: LossProbe | None = None  # of the steps that are measured

    def begin_step(self, targets: torch.Tensor, step: int) -> None:
        """Be told all of this rank's targets of the coming optimizer step, and its number, the first being 1."""

    def undo_step(self) -> None:
        """Take the counts of this step back: it is not trained on."""

    def loss(self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Sum over the valid targets: hidden [T, D], weight [V_local, D], target [T] to [].

        The value is the cross-entropy; penalties show in the gradient alone, each once for every valid target.
        """
        loss, recipe = self._cross_entropy(hidden, weight, target), self._recipe
        for factor, penalty in ((recipe.cosine_penalty, cosine_penalty), (recipe.mean_penalty, mean_penalty)):
            if factor:
                loss = loss + factor * (penalty(weight, self._shard) * (target != -100).sum())
        return loss

    def _cross_entropy(self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return gated_linear_cross_entropy(
            hidden,
            weight,
            target,
            None,
            self._shard,
            reduction="sum",
            label_smoothing=self._recipe.label_smoothing,
            z_loss=self._recipe.z_loss,
            soft_cap=self._soft_cap,
            probe=self.probe,
        )

    def gates(self) -> Gates | None:
        """Of this rank's rows in the step that was begun last; None: nothing is gated."""
        return None

    def rare_fraction(self) -> float | None:
        """Share of the vocabulary that is rare in this step; None: nothing is counted."""
        return None

    def frozen_rows(self) -> torch.Tensor | None:
        """bool [V_local]: rows of the output embedding that this step must not move; None: none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any] | Iterable[dict[str, Any]]) -> None:
        pass


class GatedObjective(PlainObjective):
    """AGG over the global batch: counts cover all data-parallel ranks and all micro-batches of a step."""

    def __init__(self, recipe: ObjectiveRecipe, module: AdaptiveGradientGating) -> None:
        super().__init__(recipe, module.shard, module.soft_cap)
        self.module = module
        self._treatment: str = recipe.rare_rows

    def begin_step(self, targets: torch.Tensor, step: int) -> None:
        self.module.begin_step(targets)
        self._treatment = treatment_at(self._recipe, step)

    def undo_step(self) -> None:
        self.module.undo_step()

    def _cross_entropy(self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.gates()  # not before the first loss call of a step: counts are on their way during the forward pass
        loss: torch.Tensor = self.module(hidden, weight, target, reduction="sum", probe=self.probe)
        return loss

    def gates(self) -> Gates:
        self.module.gates = treated(self.module.current_gates(), self._treatment, self._recipe.gates)
        return self.module.gates

    def rare_fraction(self) -> float | None:
        rare_ids = self.module.current_gates().rare_ids  # of all shards
        assert rare_ids is not None
        return int(rare_ids.sum()) / self.module.shard.vocab_size

    def frozen_rows(self) -> torch.Tensor | None:
        return self.gates().rare if self._treatment == "freeze" else None

    def state_dict(self) -> dict[str, Any]:
        return self.module.frequency.state_dict()

    def load_state_dict(self, state: dict[str, Any] | Iterable[dict[str, Any]]) -> None:
        parts = [state] if isinstance(state, dict) else state
        self.module.set_extra_state(parts if self._recipe.window_steps else self._with_their_window(parts))

    def _with_their_window(self, parts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One epoch is what it was when the run began; batch or data may have been changed since."""
        for place, part in enumerate(parts):
            if place == 0:
                self.module.frequency.window_steps = part["window_steps"]
            yield part


def build_objective(
    recipe: ObjectiveRecipe,
    shard: VocabShard,
    *,
    special_ids: Sequence[int],
    token_counts: np.ndarray[Any, np.dtype[np.int64]],
    steps_per_epoch: int,
    data_parallel_group: dist.ProcessGroup | None,
    soft_cap: float = 0.0,
) -> PlainObjective:
    """
    Args:
        special_ids: bos, eos, pad, unk: never rare.
        token_counts: int64 [V], of the train shards; tells the ids that never occur.
        steps_per_epoch: the window if the recipe gives none.
        soft_cap: of logits.
    """
    if recipe.method == "mle":
        return PlainObjective(recipe, shard, soft_cap)
    excluded = list(special_ids)
    if recipe.never_seen == "exclude":
        excluded += np.flatnonzero(token_counts == 0).tolist()
    return GatedObjective(
        recipe,
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
            z_loss=recipe.z_loss,
            soft_cap=soft_cap,
        ),
    )
