"""What one loss call is asked, and the order in which it takes the targets.

Letters: T tokens of the call, N of them that are taken, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agg import kernels
from agg.gating import Gates
from agg.probe import LossProbe
from agg.vocab_shard import VocabShard


@dataclass(frozen=True)
class Job:
    """See :func:`agg.gated_linear_cross_entropy`."""

    target: torch.Tensor
    gates: Gates | None
    shard: VocabShard
    ignore_index: int
    label_smoothing: float
    chunk_tokens: int
    z_loss: float = 0.0
    soft_cap: float = 0.0
    probe: LossProbe | None = None

    def valid(self) -> torch.Tensor:
        """bool [T]: not ignored."""
        return self.target != self.ignore_index

    def target_is_rare(self) -> torch.Tensor:
        """bool [T]; False where ignored."""
        if self.gates is None:
            return torch.zeros_like(self.target, dtype=torch.bool)
        if self.gates.rare_ids is not None:
            valid = self.valid()
            return valid & self.gates.rare_ids[torch.where(valid, self.target, 0)]
        rows, here = self.shard.to_local(self.target)
        return self.shard.all_reduce((self.gates.rare[rows] & here & self.valid()).to(torch.int32)).bool()

    def positions(self) -> Positions:
        """
        Raises:
            RuntimeError: on a GPU, where it may end the process, for a target outside the vocabulary.
        """
        size, triton = self.shard.vocab_size, kernels.triton_for(self.target)
        if triton is None or (self.gates is not None and self.gates.rare_ids is None):
            valid = self.valid()
            if not kernels.values_are_at_hand(valid):
                fits = ~valid | ((self.target >= 0) & (self.target < size))
                torch._assert_async(fits.all(), f"a target is outside the vocabulary of {size} ids")
            keys = torch.where(valid, torch.where(self.target_is_rare(), self.target, self.target + size), 2 * size)
        else:
            keys = triton.keys_of_targets(self.target, self.gates and self.gates.rare_ids, size, self.ignore_index)
        keys, order = keys.sort(stable=True)
        if kernels.values_are_at_hand(keys):
            count = int((keys < 2 * size).sum())
            keys, order = keys[:count], order[:count]
        if triton is not None and len(keys):
            return Positions(order, *triton.positions_of_keys(keys, self.shard))
        valid, is_rare = keys < 2 * size, keys < size
        rows, here = self.shard.to_local(torch.where(valid, torch.where(is_rare, keys, keys - size), -1))
        return Positions(order, rows, here, valid, is_rare.sum(), valid.sum())


@dataclass(frozen=True)
class Positions:
    """By class, "target rare", "target not rare", "ignored", and within a class by id: equal targets are neighbours.

    Attributes:
        order: int64 [N], where in the call each stands, the same on all tensor-parallel ranks. N is T, or where
            counting them costs no wait, how many are not ignored.
        rows: int64 [N], of its target in this shard; 0 where that is held elsewhere, or ignored.
        here: bool [N], whether this shard holds it. valid: bool [N], not ignored.
        rare_count: int64 [], how many have a rare target: the first ones. valid_count: int64 [], how many are valid.
    """

    order: torch.Tensor
    rows: torch.Tensor
    here: torch.Tensor
    valid: torch.Tensor
    rare_count: torch.Tensor
    valid_count: torch.Tensor

    def __len__(self) -> int:
        return len(self.order)

    def part(self, first: int, end: int) -> Positions:
        """Those from ``first`` to ``end``; the counts stay those of all."""
        order, rows, here, valid = (x[first:end] for x in (self.order, self.rows, self.here, self.valid))
        return Positions(order, rows, here, valid, self.rare_count, self.valid_count)

    def is_rare(self) -> torch.Tensor:
        """bool [N]: whether its target is."""
        return torch.arange(len(self), device=self.order.device) < self.rare_count
