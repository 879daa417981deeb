"""Which tokens are rare, and how much of their gradient passes.

Letters: V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agg.vocab_shard import VocabShard


@dataclass(frozen=True)
class Gates:
    """Gates of one vocabulary shard (arXiv 2109.03127, equations 6 to 8).

    Attributes:
        rare: bool [V_local].
        g1: float32 [V_local], used at positions whose target is not rare; 1 for tokens that are not rare.
        g2: float32 [V_local], used at positions whose target is rare; 1 for tokens that are not rare.
    """

    rare: torch.Tensor
    g1: torch.Tensor
    g2: torch.Tensor


def rarity_gates(
    appearances: torch.Tensor,
    *,
    tokens: int | torch.Tensor,
    alpha: float,
    reference_batch_tokens: int,
    shard: VocabShard,
    excluded_ids: Sequence[int] | torch.Tensor = (),
) -> Gates:
    """Gates from counts.

    Rarity is ``r_k = a_k / tokens * reference_batch_tokens``: occurrences per batch of the reference size, so that
    ``alpha`` does not change meaning with the batch. With batches of that size it is the paper's count per step.
    Token k is rare if ``r_k < alpha``; then ``g1_k = min(r_k, 1)`` and ``g2_k = min(a_k / mean_{j rare} a_j, 1)``.

    Args:
        appearances: int64 [V_local], ``TokenFrequency.appearances``.
        tokens: targets counted in the window, ``TokenFrequency.tokens``.
        alpha: threshold, above 0.
        reference_batch_tokens: unit of rarity, in tokens.
        shard: these rows; the mean over rare tokens is taken over its whole tensor-parallel group.
        excluded_ids: global ids that are never rare and enter no mean (bos, eos, pad, unk). Ids that pad the
            vocabulary are excluded already.

    Raises:
        ValueError: counts of another shard's size, ``alpha`` or ``reference_batch_tokens`` not above 0.
    """
    if appearances.shape != (len(shard),):
        raise ValueError(f"appearances have shape {tuple(appearances.shape)}, this shard has {len(shard)} rows")
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}, must be above 0")
    if reference_batch_tokens < 1:
        raise ValueError(f"reference_batch_tokens is {reference_batch_tokens}, must be at least 1")
    device = appearances.device
    counted = torch.as_tensor(tokens, dtype=torch.float64, device=device).clamp(min=1)
    rarity = appearances.double() / counted * reference_batch_tokens
    rare = (rarity < alpha) & (shard.global_ids(device) < shard.vocab_size)
    excluded = torch.as_tensor(excluded_ids, dtype=torch.int64, device=device)
    rare[excluded[(excluded >= shard.start) & (excluded < shard.stop)] - shard.start] = False

    over_rare = shard.all_reduce(torch.stack([torch.where(rare, appearances, 0).sum(), rare.sum()])).double()
    # No rare token has occurred: then no position has a rare target either, and g2 is not used.
    share_of_mean = (appearances.double() * over_rare[1] / over_rare[0]).nan_to_num(nan=0.0, posinf=1.0)
    g1 = torch.where(rare, rarity.clamp(max=1), 1.0).float()
    g2 = torch.where(rare, share_of_mean.clamp(max=1), 1.0).float()
    return Gates(rare, g1, g2)
