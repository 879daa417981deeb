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
        ValueError: counts of another shard's size, a part of the vocabulary without the group that holds the others or
            not this rank's share in it, ``alpha`` or ``reference_batch_tokens`` not above 0.
    """
    if appearances.shape != (len(shard),):
        raise ValueError(f"appearances have shape {tuple(appearances.shape)}, this shard has {len(shard)} rows")
    if not isinstance(alpha, torch.Tensor) and not alpha > 0:
        raise ValueError(f"alpha is {alpha}, must be above 0")
    if reference_batch_tokens < 1:
        raise ValueError(f"reference_batch_tokens is {reference_batch_tokens}, must be at least 1")
    shard.check_whole()
    counts, candidates = _of_all_shards(appearances, shard, excluded_ids)
    return gates_of_counts(counts, candidates, tokens, alpha, reference_batch_tokens, shard)


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
        ValueError: ``rare_fraction`` is not above 0 and below 1, or the shard is a part without a group or not this
            rank's share in it.
    """
    if not 0 < rare_fraction < 1:
        raise ValueError(f"rare_fraction is {rare_fraction}, must be above 0 and below 1")
    shard.check_whole()
    counts, candidates = _of_all_shards(appearances, shard, excluded_ids)
    return alpha_of_counts(counts, candidates, tokens, rare_fraction, reference_batch_tokens)


def _of_all_shards(
    appearances: torch.Tensor, shard: VocabShard, excluded_ids: Sequence[int] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    counts = shard.all_gather(appearances).flatten()
    return counts, rare_candidates(len(counts), shard.vocab_size, excluded_ids, counts.device)


def rare_candidates(
    padded: int, vocab_size: int, excluded_ids: Sequence[int] | torch.Tensor, device: torch.device
) -> torch.Tensor:
    """bool [padded V]: ids that are neither excluded nor only pad."""
    candidates = torch.arange(padded + 1, device=device) < vocab_size  # the last entry: excluded ids that do not exist
    check_no_mask(excluded_ids)
    excluded = torch.as_tensor(excluded_ids, dtype=torch.int64, device=device)
    return candidates.index_fill_(0, torch.where(excluded < 0, padded, excluded.clamp(max=padded)), False)[:-1]


def check_no_mask(excluded_ids: Sequence[int] | torch.Tensor) -> None:
    """
    Raises:
        ValueError: they are bool, which torch would take for the ids 0 and 1.
    """
    dtype = getattr(excluded_ids, "dtype", None)
    if dtype in (torch.bool, bool) or (dtype is None and any(isinstance(excluded, bool) for excluded in excluded_ids)):
        raise ValueError("excluded_ids are bool: of a mask give the ids, mask.nonzero().flatten()")


def gates_of_counts(
    counts: torch.Tensor,
    candidates: torch.Tensor,
    tokens: int | torch.Tensor,
    alpha: float | torch.Tensor,
    reference_batch_tokens: int,
    shard: VocabShard,
) -> Gates:
    """:func:`rarity_gates` of the rows of ``shard``; counts and :func:`rare_candidates` [padded V] are of all."""
    rows = slice(shard.start, shard.stop)
    counts = counts.double()  # of two integers torch would make a float32
    # Of integers the product is exact: what occurs exactly alpha times is not rare, whatever the unit.
    rarity = (counts * reference_batch_tokens).div_(_at_least_one(tokens, counts.device))
    rare_ids = (rarity < alpha) & candidates
    # No rare token has occurred: then no position has a rare target either, and g2 is not used.
    of_rare = (counts * rare_ids).sum().clamp_(min=1e-300)
    over_mean = rare_ids.sum() / of_rare
    rare = rare_ids[rows]
    both = torch.stack([rarity[rows], counts[rows] * over_mean]).float().clamp_(max=1).masked_fill_(~rare, 1)
    g1, g2 = both.unbind()
    return Gates(rare, g1, g2, rare_ids)


def alpha_of_counts(
    counts: torch.Tensor,
    candidates: torch.Tensor,
    tokens: int | torch.Tensor,
    rare_fraction: float,
    reference_batch_tokens: int,
) -> torch.Tensor:
    """:func:`alpha_of_rare_fraction`, from counts and :func:`rare_candidates` [padded V] of all shards."""
    # Ids that are not counted sort behind all that are.
    in_order = torch.where((counts > 0) & candidates, counts.double(), torch.inf).sort().values
    number = torch.isfinite(in_order).sum().double()
    wanted = number * rare_fraction
    at_edge = in_order.gather(0, wanted.long()[None])
    # Thresholds that leave the ids which occurred as often as the one at the edge outside, and inside.
    without = torch.searchsorted(in_order, at_edge)[0]
    with_them = torch.searchsorted(in_order, at_edge, right=True)[0]
    nearer = (with_them - wanted < wanted - without) & (with_them < number)
    place = torch.where(nearer, with_them, without)
    threshold = torch.where(number > 0, in_order.gather(0, place.clamp(max=len(counts) - 1)[None])[0], 0.0)
    return threshold * reference_batch_tokens / _at_least_one(tokens, counts.device)


def _at_least_one(tokens: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """[]"""
    dtype = None if isinstance(tokens, torch.Tensor) else torch.float64
    return torch.as_tensor(tokens, dtype=dtype, device=device).clamp(min=1)
