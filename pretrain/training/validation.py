"""Loss and perplexity by frequency group over a split; never counts tokens, never draws random numbers."""

from __future__ import annotations

import deepspeed
import torch

from pretrain.console import bar
from pretrain.data.loader import evaluation_windows
from pretrain.data.prepare import PreparedData
from pretrain.evaluation.frequency_groups import GroupedPerplexity, frequency_groups
from pretrain.recipe import Recipe
from pretrain.topology import Topology


@torch.no_grad()
def measure_perplexity(
    engine: deepspeed.DeepSpeedEngine,
    prepared: PreparedData,
    recipe: Recipe,
    topology: Topology,
    split: str,
    limit_sequences: int = 0,
    *,
    show: bool = False,
) -> GroupedPerplexity:
    """Teacher-forced over non-overlapping windows; a collective, and the same on all ranks.

    Args:
        limit_sequences: only the first so many windows; 0: the whole split.
        show: draw a bar.
    """
    groups = frequency_groups(torch.from_numpy(prepared.token_counts)).to(topology.device)
    grouped = GroupedPerplexity(groups)
    was_training = engine.module.training
    engine.eval()
    windows = list(
        evaluation_windows(
            prepared,
            split,
            recipe.model.sequence_length,
            recipe.batch.micro_batch_size,
            topology.data_parallel_rank,
            topology.data_parallel_size,
            limit_sequences,
        )
    )
    with bar(len(windows), f"{split} perplexity", "batch", show=show) as progress:
        for tokens, targets in windows:
            tokens, targets = tokens.to(topology.device), targets.to(topology.device)
            losses, predictions = engine(tokens, targets, per_token=True)
            grouped.update(losses, targets.flatten(), predictions=predictions)
            progress.update()
    engine.train(was_training)
    return grouped.reduce(topology.data_parallel_group)
