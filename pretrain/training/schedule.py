"""Learning rate as a function of the step alone, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from pretrain.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of optimizer step ``step`` (the first is 0).

    Linear warm-up from 0 to the peak over ``warmup_steps`` (the first step is not 0), then: ``cosine`` to the minimum
    over ``decay_steps`` or all that is left; ``inverse_sqrt`` as peak * sqrt(warmup / step) (arXiv 1706.03762, section
    5.3); ``constant``; ``warmup_stable_decay`` constant, then linear over the last ``decay_steps`` (arXiv 2404.06395),
    and where those begin in the warm-up, the lower of both.
    """
    schedule, peak = recipe.schedule, recipe.optimizer.learning_rate
    warmup, total = schedule.warmup_steps, recipe.batch.train_steps
    lowest = peak * schedule.min_learning_rate_ratio
    warming = peak * (step + 1) / warmup if step < warmup else peak
    if schedule.kind == "warmup_stable_decay" and schedule.decay_steps is not None:
        progress = min(1.0, max(0, step - (total - schedule.decay_steps)) / schedule.decay_steps)
        return min(warming, peak + (lowest - peak) * progress)
    if step < warmup:
        return warming
    if schedule.kind == "inverse_sqrt":
        return peak * math.sqrt(warmup / (step + 1))
    if schedule.kind == "cosine":
        progress = min(1.0, (step - warmup) / max(1, (schedule.decay_steps or total - warmup)))
        return lowest + (peak - lowest) * (1 + math.cos(math.pi * progress)) / 2
    return peak
