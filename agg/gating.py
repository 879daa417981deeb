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
        rare_ids: bool [padded V], ``rare`` of all tensor-parallel ranks. None: each loss call asks them.
    """

    rare: torch.Tensor
    g1: torch.Tensor
    g2: torch.Tensor
    rare_ids: torch.Tensor | None = None

    def of_shard(self, shard: VocabShard) -> Gates:
        """The rows of ``shard``, where these are of the whole padded vocabulary."""
        rows = slice(shard.start, shard.stop)
        return Gates(self.rare[rows], self.g1[rows], self.g2[rows], self.rare_ids)


def rarity_gates(
    appearances: torch.Tensor,
    *,
    tokens: int | torch.Tensor,
    alpha: float | torch.Tensor,
    reference_batch_tokens: int,
    shard: VocabShard,
    excluded_ids: Sequence[int] | torch.Tensor = (),
) -> Gates:
    """Gates from counts.

    Rarity is ``r_k = a_k / tokens * reference_batch_tokens``: occurrences per batch of the reference size, so that
    ``alpha`` does not change meaning with the batch. With batches of that size it is the paper's count per step.
    Token k is rare if ``r_k < alpha``; then ``g1_k = min(r_k, 1)`` and ``g2_k = min(a_k / mean_{j rare} a_j, 1)``.

    Args:
        appearances: [V_local], ``TokenFrequency.appearances``.
        tokens: targets counted in the window, ``TokenFrequency.tokens``.
        alpha: threshold, above 0; or a tensor [] of :func:`alpha_of_rare_fraction`.
        reference_batch_tokens: unit of rarity, in tokens.
        shard: these rows; one gather over its tensor-parallel group gives the mean over rare tokens and tells all
            ranks what is rare everywhere.
        excluded_ids: global ids that are never rare and enter no mean (bos, eos, pad, unk). Ids that pad the
            vocabulary are excluded already.

    Raises:
        ValueError: counts of another shard's size, ``alpha`` or ``reference_batch_tokens`` not above 0.
    """
    if appearances.shape != (len(shard),):
        raise ValueError(f"appearances have shape {tuple(appearances.shape)}, this shard has {len(shard)} rows")
    if not isinstance(alpha, torch.Tensor) and not alpha > 0:
        raise ValueError(f"alpha is {alpha}, must be above 0")
    if reference_batch_tokens < 1:
        raise ValueError(f"reference_batch_tokens is {reference_batch_tokens}, must be at least 1")
    device = appearances.device
    counted = torch.as_tensor(tokens, dtype=torch.float64, device=device).clamp(min=1)
    rarity = appearances.double() / counted * reference_batch_tokens
    rare = (rarity < alpha) & (shard.global_ids(device) < shard.vocab_size)
    rare &= ~_excluded_rows(excluded_ids, shard, device)

    of_rare = shard.all_gather(torch.where(rare, appearances.double(), -1)).flatten()  # [padded V]
    rare_ids = of_rare >= 0
    # No rare token has occurred: then no position has a rare target either, and g2 is not used.
    of_mean = appearances.double() * rare_ids.sum() / of_rare.clamp(min=0).sum()
    g1 = torch.where(rare, rarity.clamp(max=1), 1.0).float()
    g2 = torch.where(rare, of_mean.nan_to_num(nan=0.0, posinf=1.0).clamp(max=1), 1.0).float()
    return Gates(rare, g1, g2, rare_ids)


def alpha_of_rare_fraction(
    appearances: torch.Tensor,
    rare_fraction: float,
    *,
    tokens: int | torch.Tensor,
    reference_batch_tokens: int,
    shard: VocabShard,
    excluded_ids: Sequence[int] | torch.Tensor = (),
) -> torch.Tensor:
    """The alpha below which ``rare_fraction`` of the vocabulary lies, as nearly as equal counts allow.

    The share is of the ids that have occurred, are not excluded and do not only pad. Ids that occurred equally often
    are rare together or not at all, whichever comes nearer to the share; they are never all rare. Of the whole
    vocabulary more may be rare: ids that have not occurred are below any alpha, unless they are excluded. One gather of
    V counts over the tensor-parallel group.

    Returns:
        float64 []; 0, and so no rare token, where none has occurred.

    Raises:
        ValueError: ``rare_fraction`` is not above 0 and below 1.
    """
    if not 0 < rare_fraction < 1:
        raise ValueError(f"rare_fraction is {rare_fraction}, must be above 0 and below 1")
    device = appearances.device
    counted = (appearances > 0) & (shard.global_ids(device) < shard.vocab_size)
    counted &= ~_excluded_rows(excluded_ids, shard, device)
    # Ids that are not counted sort behind all that are.
    counts = shard.all_gather(torch.where(counted, appearances.double(), torch.inf)).flatten().sort().values
    number = torch.isfinite(counts).sum().double()
    wanted = number * rare_fraction
    at_edge = counts.gather(0, wanted.long()[None])
    # Thresholds that leave the ids which occurred as often as the one at the edge outside, and inside.
    without = torch.searchsorted(counts, at_edge)[0]
    with_them = torch.searchsorted(counts, at_edge, right=True)[0]
    nearer = (with_them - wanted < wanted - without) & (with_them < number)
    place = torch.where(nearer, with_them, without)
    threshold = torch.where(number > 0, counts.gather(0, place.clamp(max=len(counts) - 1)[None])[0], 0.0)
    return threshold / torch.as_tensor(tokens, dtype=torch.float64, device=device).clamp(min=1) * reference_batch_tokens


def _excluded_rows(ids: Sequence[int] | torch.Tensor, shard: VocabShard, device: torch.device) -> torch.Tensor:
    """bool [V_local]"""
    rows, here = shard.to_local(torch.as_tensor(ids, dtype=torch.int64, device=device))
    excluded = torch.zeros(len(shard) + 1, dtype=torch.bool, device=device)  # the last entry: ids held elsewhere
    return excluded.index_fill_(0, torch.where(here, rows, len(shard)), True)[:-1]
