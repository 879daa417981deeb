"""Teacher-forced perplexity by frequency group; never counts tokens, never draws random numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from pretrain.console import bar
from pretrain.data.windows import EvaluationWindows
from pretrain.evaluation.frequency_groups import GroupedPerplexity

# tokens [B, L] and targets [B, L], -100 where none is asked for, to -log p(target) in nats and most likely ids, both
# [B * L] and only of meaning where there is a target; a collective
TokenLosses = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def measure_perplexity(
    token_losses: TokenLosses,
    windows: EvaluationWindows,
    groups: torch.Tensor,
    data_parallel_group: dist.ProcessGroup | None,
    label: str = "",
) -> GroupedPerplexity:
    """Over this rank's windows and those of the other data-parallel ranks; a collective, the same on all ranks.

    Args:
        groups: int8 [V], see :func:`frequency_groups`, on the device of the losses.
        label: of a bar; empty: none.
    """
    grouped = GroupedPerplexity(groups)
    with bar(len(windows), label, "batch", show=bool(label)) as progress:
        for tokens, targets in windows:
            tokens, targets = tokens.to(groups.device), targets.to(groups.device)
            losses, predictions = token_losses(tokens, targets)
            grouped.update(losses, targets.flatten(), predictions=predictions)
            progress.update()
    return grouped.reduce(data_parallel_group)


def sliding_stride(window: int) -> int:
    """Tokens that a sliding window of so many moves on: 112 of 512 in Yu et al. 2022, which leaves 400 as context."""
    return max(1, round(window * 112 / 512))
