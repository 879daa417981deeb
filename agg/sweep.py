"""One pass over all chunks of a loss call: losses, and the gradients that are asked for.

Letters: T tokens, N positions of them that are taken, C of a chunk, D hidden size, V vocabulary, V_local rows of this
rank's shard; P softmax, Y one-hot targets. The maths is told in :mod:`agg.linear_cross_entropy`.
"""

from __future__ import annotations

import torch

from agg import kernels
from agg.gating import Gates
from agg.gradient_sums import GradientSums
from agg.job import Job, Positions
from agg.kernels import TINY
from agg.probe import probe_columns
from agg.projection import Projection


class Sweep:
    """
    Positions are taken in the order: target rare, target not rare, ignored. The chunk in which the rare ones end is
    the turn: there the sum so far and the rows of P that are rare get the factor ``between``. The factor ``after`` of
    both is left to :class:`~agg.gradient_sums.GradientSums`, which multiplies in any case.

    Args:
        hidden: [T, D]; where ignored it may hold anything. weight: [V_local, D].
        row_scale: [T], what the loss of a position counts for, 0 where ignored; None: 1 of all others.

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
        self.job, self.hidden = job, hidden
        self.real = weight[: job.shard.real]  # rows that only pad take no part
        self.sum_dtype = sum_dtype(hidden.dtype)
        self.positions = job.positions()
        self._count = len(self.positions)
        self._scale = self.positions.valid.to(self.sum_dtype) if row_scale is None else row_scale[self.positions.order]
        self._counts_once = row_scale is None
        # Of each position: see kernels.over_shards_.
        self._terms = torch.empty(5, self._count, dtype=self.sum_dtype, device=hidden.device)
        self._hidden_sum: torch.Tensor | None = None
        if needs_hidden:
            all_taken = self._count == len(hidden)
            self._hidden_sum = (torch.empty if all_taken else torch.zeros)(
                hidden.shape, dtype=self.sum_dtype, device=hidden.device
            )
        self._weight_sum: torch.Tensor | None = None
        if needs_weight:
            self._weight_sum = torch.empty(weight.shape, dtype=self.sum_dtype, device=weight.device)
            if len(self.real) < len(weight) or self._count == 0:
                self._weight_sum[len(self.real) if self._count else 0 :] = 0
        self._factors = None if job.gates is None else row_factors(job.gates, hidden.dtype)
        self._probe_columns: torch.Tensor | None = None
        if job.probe is not None and job.gates is not None:
            self._probe_columns = probe_columns(job.gates, job.shard.real, hidden.dtype)
        self._smoothing_per_id = job.label_smoothing / job.shard.vocab_size
        self._row_sum = self.real.sum(0, dtype=self.sum_dtype) if job.label_smoothing else None  # local, [D]
        self._row_sum_all = None if self._row_sum is None else job.shard.all_reduce(self._row_sum.clone())

    def run(self) -> GradientSums:
        with torch.autocast(self.hidden.device.type, enabled=False):
            size = self.job.chunk_tokens
            self._projection = Projection(self.real, min(size, self._count))
            for first in range(0, self._count, size):
                self._chunk(first, min(first + size, self._count))
            del self._projection  # before dW is rounded
            factor = None if self._weight_sum is None else self._complete_rows()
            self._complete_hidden()
        self.losses = self._terms.new_zeros(len(self.hidden)).scatter_(0, self.positions.order, self._terms[0])
        if self.job.probe is not None:
            # Of its own: with reduction "none" the losses are the caller's, to weigh in place.
            self.job.probe.token_losses.append((self.job.target, self.losses.clone()))
        return GradientSums(self.losses, self._hidden_sum, self._weight_sum, factor, self.hidden.dtype)

    def _chunk(self, first: int, end: int) -> None:
        """Losses of the positions from ``first`` to ``end``, C of them, and their share of P in the gradients."""
        job, eps, chunk = self.job, self.job.label_smoothing, self.positions.part(first, end)
        hidden = kernels.take_rows(self.hidden, chunk.order, chunk.valid)  # [C, D]
        logits = self._projection.logits(hidden)
        slope = None
        if job.soft_cap:
            logits = logits.to(self.sum_dtype)  # 1 - tanh^2 in 16 bits would be little but rounding
            slope = soft_cap_(logits, job.soft_cap)
        terms = self._terms[:, first:end]
        p = softmax_over_shards_(logits, chunk, job, self._scale[first:end], terms)
        losses, log_norm, factor, p_scale, own = terms
        if self._probe_columns is not None and job.probe is not None:
            of_chunk = (self.positions.is_rare()[first:end], chunk.valid)
            job.probe.add_pushes(self._probe_columns, p, factor, losses, *of_chunk)
        if slope is not None and len(self.real):
            p *= slope
            own *= slope.gather(1, chunk.rows[:, None]).squeeze(1)
        if self._row_sum_all is not None:
            mean_logit = hidden.to(self.sum_dtype) @ self._row_sum_all / job.shard.vocab_size
            losses.mul_(1 - eps).add_(torch.where(chunk.valid, log_norm - mean_logit, 0), alpha=eps)
        if len(self.real) == 0 or (self._hidden_sum is None and self._weight_sum is None):
            return
        p = self._projection.put(p)
        if self._hidden_sum is not None:
            product = self._projection.times_weight(len(hidden), self.sum_dtype)
            kernels.put_hidden_gradient_(self._hidden_sum, product, p_scale, self.real, chunk, own)
        if self._weight_sum is not None:
            total = self._weight_sum[: len(self.real)]
            scaled = hidden if self._p_counts_once() else kernels.scaled_rows(hidden, p_scale)
            if self._factors is not None:
                self._gate_at_turn(total, p, first)
            self._projection.add_transposed_(total, scaled, anew=first == 0)

    def _p_counts_once(self) -> bool:
        """Whether the softmax of this shard is all that each position adds, 0 where ignored, as hidden is there."""
        return self._counts_once and self.job.shard.world_size == 1 and not self.job.z_loss

    def _gate_at_turn(self, total: torch.Tensor, p: torch.Tensor, first: int) -> None:
        """In the chunk where the positions with rare targets end, gate what they have added and what they will add."""
        assert self._factors is not None
        between, rare_count = self._factors[0][: len(total)], self.positions.rare_count
        kernels.gate_at_turn_(p, between, rare_count, first)
        if first:
            kernels.scale_at_turn_(total, between, rare_count, first, len(p))

    def _complete_rows(self) -> torch.Tensor | None:
        """Add to dW what is not P; returns the factor [V_local] that its rows still lack, if they lack any."""
        assert self._weight_sum is not None
        self._add_smoothing()
        coefficient = self._terms[4]
        if self.job.gates is not None and self._smoothing_per_id:  # what the gate took from it
            rows = self.positions.rows
            gate = torch.where(self.positions.is_rare(), self.job.gates.g2[rows], self.job.gates.g1[rows])
            closed = (1 - gate.to(self.sum_dtype)) * self.positions.here
            coefficient = coefficient - closed * self._smoothing_per_id * self._scale
        # No gate holds the entry of a target: it is divided by what its row gets, which may not be 0 then.
        after = None if self._factors is None else self._factors[1]
        given = (self.hidden, self.positions, coefficient, self.job.chunk_tokens)
        return kernels.add_entries_(self._weight_sum, after, *given)

    def _add_smoothing(self) -> None:
        """The part of ``-Y'`` that is the same for all ids, gated like P."""
        if not self.job.label_smoothing:
            return
        assert self._weight_sum is not None
        of_rare = torch.where(self.positions.is_rare(), self._scale, 0)
        open_ = torch.ones(len(self.real), dtype=self.sum_dtype, device=of_rare.device)
        between = open_ if self._factors is None else self._factors[0][: len(self.real)]
        scales = torch.stack([self._scale - of_rare, of_rare])
        sums = torch.zeros(2, self.hidden.shape[1], dtype=self.sum_dtype, device=of_rare.device)
        for first in range(0, self._count, self.job.chunk_tokens):
            chunk = self.positions.part(first, min(first + self.job.chunk_tokens, self._count))
            hidden = kernels.take_rows(self.hidden, chunk.order, chunk.valid).to(self.sum_dtype)
            sums += scales[:, first : first + len(chunk)] @ hidden
        for factor, of_class in zip((open_, between), sums, strict=True):
            self._weight_sum[: len(self.real)].addr_(factor, of_class, alpha=-self._smoothing_per_id)

    def _complete_hidden(self) -> None:
        """Add to dH what smoothing takes from all ids alike, and what the other tensor-parallel ranks have."""
        if self._hidden_sum is None:
            return
        if len(self.real) == 0:
            self._hidden_sum.zero_()
        if self._row_sum is not None:
            scale = torch.zeros(len(self.hidden), dtype=self.sum_dtype, device=self.hidden.device)
            scale[self.positions.order] = self._scale
            self._hidden_sum.addr_(scale, self._row_sum, alpha=-self._smoothing_per_id)
        self.job.shard.all_reduce(self._hidden_sum)


def row_factors(gates: Gates, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors of rows that gate both classes without touching C x V.

    With A_r and A_c the ungated ``P^T H`` of positions whose target is rare and is not,
    ``g2 A_r + g1 A_c = after * (between * A_r + A_c)``: one buffer holds the sums of both.

    Returns:
        between, after: [V_local], float32 at least. Where g2 is not 0, ``after`` is at least 2^-60, in float16 2^-14 so
        that ``between`` fits: a smaller g1 counts as that much.
    """
    least = 2.0**-14 if dtype == torch.float16 else TINY
    triton = kernels.triton_for(gates.g1)
    if triton is not None and dtype != torch.float64:
        factors: tuple[torch.Tensor, torch.Tensor] = triton.row_factors(gates.g1, gates.g2, least)
        return factors
    g1, g2 = (gate.to(sum_dtype(dtype)) for gate in (gates.g1, gates.g2))
    after = torch.where(g2 > 0, g1.clamp(min=least), g1)
    return torch.where(after > 0, g2 / after, 1.0), after


def soft_cap_(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """``logits = cap * tanh(logits / cap)`` in place; returns the slope ``1 - tanh^2`` there, of the same shape."""
    tanh = logits.div_(cap).tanh_()
    slope = tanh.square().neg_().add_(1)
    logits.mul_(cap)
    return slope


def softmax_over_shards_(
    logits: torch.Tensor, chunk: Positions, job: Job, scale: torch.Tensor, terms: torch.Tensor
) -> torch.Tensor:
    """Softmax over a split vocabulary with one collective.

    Args:
        logits: [C, real rows], overwritten. chunk: its positions. scale: [C], what each loss counts for.
        terms: [5, C], overwritten: see :func:`agg.kernels.over_shards_`.

    Returns:
        The softmax over this rank's rows alone, which is to be multiplied by one of the terms; 0 at the targets.
    """
    local_p, told = kernels.softmax_rows_(logits, chunk.rows, chunk.here, terms.dtype)
    of_ranks = job.shard.all_gather(told)
    kernels.over_shards_(terms, of_ranks, job.shard.rank, chunk, scale, 1 - job.label_smoothing, job.z_loss)
    return local_p


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of accumulators: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32
