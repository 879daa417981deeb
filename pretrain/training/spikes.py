"""Steps that are better not trained on: a loss or gradient that is not finite, or far above the recent ones.

The batch of a skipped step counts as seen, not as trained on: the step number, the learning rate and the data go on;
weights, optimizer state, token counts and ``consumed_tokens`` are as if it had not been there. (Random numbers that its
dropout drew stay drawn.) A rollback loads the last checkpoint and skips all batches since, the offending one included,
as in PaLM (arXiv 2204.02311, section 5.1). What was skipped is in the checkpoints, so that a resumed run is the same.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Literal

from pretrain.checkpointing.checkpoint import Progress
from pretrain.errors import NonFiniteError, SpikeError
from pretrain.recipe import SpikesRecipe


@dataclass(frozen=True)
class Spike:
    """Why a step was not trained on, and what follows."""

    reason: str
    action: Literal["stop", "skip", "rollback"]
    is_finite: bool


def find_spike(spikes: SpikesRecipe, progress: Progress, loss: float, grad_norm: float) -> Spike | None:
    """Judge a step before its update; the same on all ranks, as its arguments are.

    Args:
        loss: nats per token, of the global batch.
        grad_norm: global, before clipping.
    """
    if not math.isfinite(loss):
        return Spike(f"the loss is {loss}", spikes.on_nonfinite, is_finite=False)
    if not math.isfinite(grad_norm):
        return Spike("the gradient is not finite", spikes.on_nonfinite, is_finite=False)
    if len(progress.recent) < spikes.window_steps:
        return None
    for place, name, value, factor in (
        (0, "loss", loss, spikes.loss_factor),
        (1, "gradient norm", grad_norm, spikes.grad_norm_factor),
    ):
        median = statistics.median(step[place] for step in progress.recent[-spikes.window_steps :])
        if 0 < factor * median < value:  # of a loss of 0 nothing is a multiple
            reason = f"the {name} is {value:.4g}, {value / median:.1f} x the median of {spikes.window_steps} steps"
            return Spike(reason, spikes.on_outlier, is_finite=True)
    return None


def after_training(
    spikes: SpikesRecipe, progress: Progress, samples: int, tokens: int, point: tuple[float, float]
) -> Progress:
    """Progress after a step that was trained on; ``point`` is its loss and gradient norm."""
    watching = bool(spikes.loss_factor or spikes.grad_norm_factor)
    return dataclasses.replace(
        progress,
        step=progress.step + 1,
        consumed_samples=progress.consumed_samples + samples,
        consumed_tokens=progress.consumed_tokens + tokens,
        skips_in_a_row=0,
        recent=(*progress.recent, point)[-spikes.window_steps :] if watching else (),
    )


def after_skipping(progress: Progress, steps: int, samples: int) -> Progress:
    """Progress after so many steps, of so many samples together, that were not trained on, as after a rollback."""
    start, stop = progress.consumed_samples, progress.consumed_samples + samples
    earlier = list(progress.skipped_samples)
    if earlier and earlier[-1][1] == start:
        start = earlier.pop()[0]
    return dataclasses.replace(
        progress,
        step=progress.step + steps,
        consumed_samples=stop,
        skipped_samples=(*earlier, (start, stop)),
        skips_in_a_row=0,
    )


def pass_over(spikes: SpikesRecipe, progress: Progress, spike: Spike, samples: int) -> Progress:
    """Progress past the step that ``spike`` is about.

    Raises:
        SpikeError: the recipe says to stop there, or too many steps were skipped in a row.
    """
    if spike.action == "stop":
        raise stop_for(spike, progress.step + 1)
    in_a_row = progress.skips_in_a_row
    if spike.action == "skip" and in_a_row >= spikes.max_in_a_row:
        raise stop_for(spike, progress.step + 1, f", after {in_a_row} skipped steps in a row (spikes.max_in_a_row)")
    return dataclasses.replace(after_skipping(progress, 1, samples), skips_in_a_row=in_a_row + 1)


def stop_for(spike: Spike, step: int, more: str = "") -> SpikeError:
    """What to raise at ``step``: nothing of it was updated."""
    kind = SpikeError if spike.is_finite else NonFiniteError
    return kind(
        f"step {step}: {spike.reason}{more}. Nothing was updated, and checkpoints saved before are good. "
        "A lower learning rate, gradient clipping, fp32, or spikes.on_nonfinite and on_outlier (skip, rollback) are "
        "the usual ways out"
    )
