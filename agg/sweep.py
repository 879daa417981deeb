"""One pass over all chunks of a loss call: losses, and the gradients that are asked for.

Letters: T tokens, C tokens of a chunk, D hidden size, V vocabulary, V_local rows of this rank's shard; P softmax,
Y one-hot targets. The maths is told in :mod:`agg.linear_cross_entropy`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agg import kernels
from agg.gating import Gates
from agg.gradient_sums import GradientSums
from agg.probe import LossProbe, probe_columns
from agg.vocab_shard import VocabShard

TINY = 2.0**-60  # for a factor of rows that will be divided by


@dataclass(frozen=True)
class Job:
    """What one loss call is asked; see :func:`agg.gated_linear_cross_entropy`."""

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


class Sweep:
    """
    Positions are taken in the order: target rare, target not rare, ignored. The chunk in which the rare ones end is
    the turn: there the sum so far and the rows of P that are rare get the factor ``between``. The factor ``after`` of
    both is left to :class:`~agg.gradient_sums.GradientSums`, which multiplies in any case.

    Args:
        hidden: [T, D]; where ignored it may hold anything. weight: [V_local, D].
        row_scale: [T], what the loss of a position counts for, 0 where ignored; None without gradients.

    Attributes:
        losses: [T], 0 where ignored.
    """

    def __init__(
        self,
        job: Job,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        row_scale: torch.Tensor | None,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> None:
        self.job, self.hidden, self.row_scale = job, hidden, row_scale
        self.real = weight[: job.shard.real]  # rows that only pad take no part
        self.sum_dtype = sum_dtype(hidden.dtype)
        self.losses = torch.zeros(hidden.shape[0], dtype=self.sum_dtype, device=hidden.device)
        self._valid = job.valid()
        self._rows, self._here = job.shard.to_local(torch.where(self._valid, job.target, -1))
        self._is_rare = job.target_is_rare()
        self._order = self._in_order()
        self._own_p = torch.zeros_like(self.losses)  # what of P is added apart at each target; 0 where held elsewhere
        self._own_slope: torch.Tensor | None = torch.ones_like(self.losses) if job.soft_cap else None
        self._hidden_sum: torch.Tensor | None = None
        if needs_hidden:
            self._hidden_sum = torch.zeros(hidden.shape, dtype=self.sum_dtype, device=hidden.device)
        self._weight_sum: torch.Tensor | None = None
        if needs_weight:
            self._weight_sum = torch.empty(weight.shape, dtype=self.sum_dtype, device=weight.device)
            self._weight_sum[job.shard.real :] = 0
        self._factors = None if job.gates is None else row_factors(job.gates, hidden.dtype)
        self._probe_columns: torch.Tensor | None = None
        if job.probe is not None and job.gates is not None:
            self._probe_columns = probe_columns(job.gates, job.shard.real, hidden.dtype)
        self._smoothing_per_id = job.label_smoothing / job.shard.vocab_size
        self._row_sum = self.real.sum(0, dtype=self.sum_dtype) if job.label_smoothing else None  # local, [D]
        self._row_sum_all = None if self._row_sum is None else job.shard.all_reduce(self._row_sum.clone())

    def run(self) -> GradientSums:
        with torch.autocast(self.hidden.device.type, enabled=False):
            self._chunks()
            factor = None if self._weight_sum is None else self._complete_rows()
        if self.job.probe is not None:
            self.job.probe.token_losses.append((self.job.target, self.losses))
        if self._hidden_sum is not None:
            self.job.shard.all_reduce(self._hidden_sum)
        return GradientSums(self.losses, self._hidden_sum, self._weight_sum, factor, self.hidden.dtype)

    def _chunks(self) -> None:
        if self._weight_sum is not None and len(self._order) == 0:
            self._weight_sum.zero_()
        rare_count = self._is_rare.sum()
        size = self.job.chunk_tokens
        self._logits = kernels.logits_buffer(self.hidden, min(size, len(self._order)), len(self.real))
        for first in range(0, len(self._order), size):
            self._chunk(self._order[first : first + size], first, rare_count)
        del self._logits  # before dW is rounded

    def _in_order(self) -> torch.Tensor:
        """int64: indices of the positions in the order of their classes; without the ignored if that costs no wait."""
        order = torch.where(self._is_rare, 0, torch.where(self._valid, 1, 2)).argsort(stable=True)
        return order[: int(self._valid.sum())] if kernels.values_are_at_hand(order) else order

    def _hidden_of(self, chunk: torch.Tensor) -> torch.Tensor:
        """[C, D], 0 where ignored: what is there may be NaN, as of a masked padding, and 0 times it would be too."""
        hidden = self.hidden[chunk]
        if kernels.values_are_at_hand(chunk):  # the order ends before the ignored
            return hidden
        return hidden.masked_fill_(~self._valid[chunk][:, None], 0)  # a copy, as it was picked out

    def _chunk(self, chunk: torch.Tensor, first: int, rare_count: torch.Tensor) -> None:
        """Losses of the positions ``chunk`` [C], and their share of P in the gradients."""
        eps = self.job.label_smoothing
        hidden, here = self._hidden_of(chunk), self._here[chunk]  # [C, D], [C]
        logits = torch.mm(hidden, self.real.T, out=self._logits[: len(chunk)])
        slope = None
        if self.job.soft_cap:
            logits = logits.to(self.sum_dtype)  # 1 - tanh^2 in 16 bits would be little but rounding
            slope = soft_cap_(logits, self.job.soft_cap)
        local_p, log_norm, factor, own_logit, own_p = softmax_over_shards_(
            logits, self._rows[chunk], here, self.job.shard, self.sum_dtype
        )
        losses = log_norm - own_logit
        take_out_targets_(local_p, self._rows[chunk], here)
        if self._probe_columns is not None and self.job.probe is not None:
            of_chunk = (self._is_rare[chunk], self._valid[chunk])
            self.job.probe.add_pushes(self._probe_columns, local_p, factor, losses, *of_chunk)
        if self.job.z_loss:  # d(z_loss log_norm^2)/d(logit) = 2 z_loss log_norm P
            more = 1 + 2 * self.job.z_loss * log_norm
            factor, own_p = factor * more, own_p * more
        if slope is not None and self._own_slope is not None and len(self.real):
            local_p *= slope
            self._own_slope[chunk] = slope.gather(1, self._rows[chunk][:, None]).squeeze(1)
            own_p = own_p * self._own_slope[chunk]
        self._own_p[chunk] = own_p
        if self._row_sum_all is not None:
            mean_logit = hidden.to(self.sum_dtype) @ self._row_sum_all / self.job.shard.vocab_size
            losses = (1 - eps) * losses + eps * (log_norm - mean_logit)
        self.losses[chunk] = torch.where(self._valid[chunk], losses, 0)
        if self.row_scale is None or len(self.real) == 0:
            return
        local_p = local_p.to(hidden.dtype)
        scale = self.row_scale[chunk]
        p_scale = (scale * factor)[:, None]  # what the other ranks add to the norm is a factor of rows
        if self._hidden_sum is not None:
            part = (local_p @ self.real).to(self.sum_dtype).mul_(p_scale)
            own = (self._minus_own_target(chunk) + own_p) * scale * here
            part += self.real[self._rows[chunk]].to(self.sum_dtype) * own[:, None]
            if self._row_sum is not None:
                part -= self._smoothing_per_id * scale[:, None] * self._row_sum
            self._hidden_sum[chunk] = part
        if self._weight_sum is not None:
            scaled = (hidden.to(self.sum_dtype) * p_scale).to(hidden.dtype)
            self._add_p(local_p, scaled, first, rare_count)

    def _add_p(self, local_p: torch.Tensor, scaled: torch.Tensor, first: int, rare_count: torch.Tensor) -> None:
        """dW gains ``P^T H`` of a chunk, which begins at place ``first`` of the order; ``local_p`` is overwritten."""
        assert self._weight_sum is not None
        total = self._weight_sum[: len(self.real)]
        if self._factors is not None:
            self._gate_at_turn(total, local_p, self._factors[0], first, rare_count)
        kernels.add_product_(total, local_p.T, scaled, anew=first == 0)

    def _gate_at_turn(
        self, total: torch.Tensor, local_p: torch.Tensor, between: torch.Tensor, first: int, rare_count: torch.Tensor
    ) -> None:
        """In the chunk where the positions with rare targets end, gate what they have added and what they will add."""
        between, rare_here = between[: len(total)], rare_count - first
        is_turn = (rare_here > 0) & (rare_here <= len(local_p))
        kernels.gate_leading_rows_(local_p, between, torch.where(is_turn, rare_here, 0))
        if first:
            kernels.scale_rows_if_(total, between, is_turn)

    def _complete_rows(self) -> torch.Tensor | None:
        """Add to dW what is not P; returns the factor [V_local] that its rows still lack, if they lack any."""
        assert self._weight_sum is not None
        self._add_smoothing()
        factor = own_factor = None
        if self._factors is not None:
            after = self._factors[1]
            # No gate holds the entry of a target: it is divided by what its row gets, which may not be 0 then.
            own_factor = after[self._rows].clamp_(min=TINY)
            place = torch.where(self._here, self._rows, len(after))
            factor = torch.cat([after, after.new_ones(1)]).index_put_((place,), own_factor)[:-1]
        self._add_target_entries(own_factor)
        return factor

    def _minus_own_target(self, positions: torch.Tensor | slice) -> float | torch.Tensor:
        """``- (1 - eps)``, times the slope of each target's logit where logits are capped."""
        alone = self.job.label_smoothing - 1
        return alone if self._own_slope is None else alone * self._own_slope[positions]

    def _add_smoothing(self) -> None:
        """The part of ``-Y'`` that is the same for all ids, gated like P."""
        if not self.job.label_smoothing:
            return
        assert self._weight_sum is not None and self.row_scale is not None
        of_rare = torch.where(self._is_rare, self.row_scale, 0)
        open_ = torch.ones(len(self.real), dtype=self.sum_dtype, device=of_rare.device)
        between = open_ if self._factors is None else self._factors[0][: len(self.real)]
        scales = torch.stack([self.row_scale - of_rare, of_rare])
        sums = torch.zeros(2, self.hidden.shape[1], dtype=self.sum_dtype, device=of_rare.device)
        for chunk in self._order.split(self.job.chunk_tokens):
            sums += scales[:, chunk] @ self._hidden_of(chunk).to(self.sum_dtype)
        for factor, of_class in zip((open_, between), sums, strict=True):
            self._weight_sum[: len(self.real)].addr_(factor, of_class, alpha=-self._smoothing_per_id)

    def _add_target_entries(self, own_factor: torch.Tensor | None) -> None:
        """``P - Y`` of the targets, which no gate holds, over ``own_factor`` [T] that their rows will get."""
        assert self._weight_sum is not None and self.row_scale is not None
        coefficient = self._own_p + self._minus_own_target(slice(None))
        if self.job.gates is not None and self._smoothing_per_id:  # what the gate took from it
            gate = torch.where(self._is_rare, self.job.gates.g2[self._rows], self.job.gates.g1[self._rows])
            coefficient -= (1 - gate.to(self.sum_dtype)) * self._smoothing_per_id
        if own_factor is not None:
            coefficient /= own_factor
        coefficient *= self.row_scale * self._here
        for chunk in self._order.split(self.job.chunk_tokens):
            entries = self._hidden_of(chunk).to(self.sum_dtype) * coefficient[chunk][:, None]
            kernels.add_rows_(self._weight_sum, self._rows[chunk], entries, self._here[chunk])


def row_factors(gates: Gates, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors of rows that gate both classes without touching C x V.

    With A_r and A_c the ungated ``P^T H`` of positions whose target is rare and is not,
    ``g2 A_r + g1 A_c = after * (between * A_r + A_c)``: one buffer holds the sums of both.

    Returns:
        between, after: [V_local], float32 at least. Where g2 is not 0, ``after`` is at least 2^-60, in float16 2^-14 so
        that ``between`` fits: a smaller g1 counts as that much.
    """
    g1, g2 = (gate.to(sum_dtype(dtype)) for gate in (gates.g1, gates.g2))
    after = torch.where(g2 > 0, g1.clamp(min=2.0**-14 if dtype == torch.float16 else TINY), g1)
    return torch.where(after > 0, g2 / after, 1.0), after


def soft_cap_(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """``logits = cap * tanh(logits / cap)`` in place; returns the slope ``1 - tanh^2`` there, of the same shape."""
    tanh = logits.div_(cap).tanh_()
    slope = tanh.square().neg_().add_(1)
    logits.mul_(cap)
    return slope


def softmax_over_shards_(
    logits: torch.Tensor, rows: torch.Tensor, here: torch.Tensor, shard: VocabShard, sum_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax over a split vocabulary with one collective.

    Args:
        logits: [C, real rows], overwritten. rows: of the targets [C]. here: whether each is on this rank.

    Returns:
        The softmax over this rank's rows alone, of which P is ``factor`` times; the log of the whole norm [C];
        factor [C]; the target's logit [C]; P of the targets that are here, else 0 [C], before it is rounded.
    """
    local_p, largest, total, own = kernels.softmax_rows_(logits, rows, sum_dtype)
    own = torch.where(here, own, 0)
    own_p = torch.where(here, (own - largest).exp() / total, 0)
    if shard.world_size == 1:
        return local_p, largest + total.log(), torch.ones_like(own), own, own_p
    of_ranks = shard.all_gather(torch.stack([largest, total, own]))
    largest_of_all = of_ranks[:, 0].amax(0)
    norm = (of_ranks[:, 1] * (of_ranks[:, 0] - largest_of_all).exp()).sum(0)
    factor = total * (largest - largest_of_all).exp() / norm
    return local_p, largest_of_all + norm.log(), factor, of_ranks[:, 2].sum(0), own_p * factor


def take_out_targets_(local_p: torch.Tensor, rows: torch.Tensor, here: torch.Tensor) -> None:
    """0 at the targets: rounded to 16 bits, a P near 1 would leave nothing of ``P - 1``, which is added apart."""
    if local_p.shape[1]:
        place = rows[:, None]
        local_p.scatter_(1, place, local_p.gather(1, place).masked_fill_(here[:, None], 0))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of accumulators: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32
