"""Perplexity and distinct predictions by how frequent a token is in the training data.

The groups are those of Yu et al. 2022 (arXiv 2109.03127): by rank in the vocabulary sorted by training count.
Letters: V unpadded vocabulary size, T tokens of one call.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from pretrain.evaluation.group_names import DECILES, GROUPS

LAST_PERCENT = (30, 80)  # of the sorted vocabulary: where frequent and medium end


def frequency_groups(token_counts: torch.Tensor) -> torch.Tensor:
    """int8 [V]: the place of each id's group in :data:`GROUPS`.

    Args:
        token_counts: int64 [V], how often each id occurs in the training data. Equal counts are ordered by id.
    """
    vocab_size = len(token_counts)
    order = token_counts.sort(descending=True, stable=True).indices
    frequent_end, medium_end = (vocab_size * percent // 100 for percent in LAST_PERCENT)
    groups = torch.full_like(order, GROUPS.index("rare"), dtype=torch.int8)
    groups[order[:medium_end]] = GROUPS.index("medium")
    groups[order[:frequent_end]] = GROUPS.index("frequent")
    return groups


def frequency_deciles(token_counts: torch.Tensor) -> torch.Tensor:
    """int8 [V]: the place of each id in :data:`DECILES`; 1 holds the most frequent tenth of the ids that occur.

    Unlike the groups, the tenths are of the n ids that occur: the id at place r, counted from 0, is in
    ``1 + floor(10 r / n)``, so below ten such ids some are empty. Ids that never occur are on their own.

    Args:
        token_counts: int64 [V], how often each id occurs in the training data. Equal counts are ordered by id.
    """
    order = token_counts.sort(descending=True, stable=True).indices
    seen = int((token_counts > 0).sum())
    deciles = torch.full_like(order, DECILES.index("never_seen"), dtype=torch.int8)
    deciles[order[:seen]] = (10 * torch.arange(seen) // max(seen, 1)).to(torch.int8)
    return deciles


class GroupedPerplexity:
    """Collects losses and teacher-forced predictions over a split, then gives one number for each group.

    ``update`` for each batch, ``reduce`` once over the data-parallel ranks, then the numbers. Sums are fp64.
    """

    def __init__(self, groups: torch.Tensor):
        """groups: int8 [V] of :func:`frequency_groups`, on the device of the losses."""
        self.groups = groups.long()
        self._reduced = False
        self._loss_sums = torch.zeros(len(GROUPS), dtype=torch.float64, device=groups.device)
        self._target_counts = torch.zeros(len(groups), dtype=torch.int64, device=groups.device)
        self._predicted = torch.zeros(len(groups), dtype=torch.uint8, device=groups.device)

    @torch.no_grad()
    def update(
        self,
        token_losses: torch.Tensor,
        targets: torch.Tensor,
        ignore_index: int = -100,
        predictions: torch.Tensor | None = None,
    ) -> None:
        """Count one batch of this rank.

        Args:
            token_losses: [T], -log p(target) in nats.
            targets: int64 [T], ids below V or ``ignore_index``; ignored positions count nowhere.
            predictions: int64 [T], the most probable id at each position, below V.
        """
        if self._reduced:
            raise RuntimeError("update after reduce would mix sums of one rank with sums of all")
        kept = targets != ignore_index
        targets = targets[kept]
        self._loss_sums.index_add_(0, self.groups[targets], token_losses[kept].double())
        self._target_counts += torch.bincount(targets, minlength=len(self.groups))
        if predictions is not None:
            self._predicted[predictions[kept]] = 1

    def reduce(self, group: dist.ProcessGroup | None) -> GroupedPerplexity:
        """Sum over the ranks of a data-parallel group, once; None: this rank saw the whole split."""
        if self._reduced:
            raise RuntimeError("reduce was called twice: every sum would be counted once for each rank again")
        self._reduced = True
        if group is not None:
            dist.all_reduce(self._loss_sums, group=group)
            dist.all_reduce(self._target_counts, group=group)
            dist.all_reduce(self._predicted, op=dist.ReduceOp.MAX, group=group)
        return self

    def perplexity(self) -> dict[str, float | None]:
        """``exp(mean loss)`` for each group and ``total``; None without a target, inf where it overflows."""
        return {name: None if loss is None else _exp(loss) for name, loss in self.mean_loss().items()}

    def mean_loss(self) -> dict[str, float | None]:
        """Nats per token for each group and ``total``; None without a target."""
        loss_sums, counts = self._loss_sums.tolist(), self.target_tokens()
        sums = {**dict(zip(GROUPS, loss_sums, strict=True)), "total": math.fsum(loss_sums)}
        return {name: loss_sum / counts[name] if counts[name] else None for name, loss_sum in sums.items()}

    def target_tokens(self) -> dict[str, int]:
        """Targets in each group and in ``total``."""
        return self._by_group(self._target_counts)

    def unique_targets(self) -> dict[str, int]:
        """Distinct ids among the targets: what human text uses."""
        return self._by_group((self._target_counts > 0).long())

    def unique_tokens(self) -> dict[str, int]:
        """Distinct ids among the predictions; 0 where none were given."""
        return self._by_group(self._predicted.long())

    def _by_group(self, values: torch.Tensor) -> dict[str, int]:
        sums = torch.zeros(len(GROUPS), dtype=torch.int64, device=values.device).index_add_(0, self.groups, values)
        return {**dict(zip(GROUPS, sums.tolist(), strict=True)), "total": int(sums.sum())}


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
