"""Cross-entropy of a linear projection: chunked, vocabulary-parallel, its weight gradient gated.

Letters: T tokens, C tokens of a chunk, D hidden size, V vocabulary, V_local rows of this rank's shard,
R tensor-parallel ranks; H [T, D] hidden states, W [V_local, D] output embedding, P softmax, Y one-hot targets.

    dL/dH = (P - Y) W              not gated
    dL/dW = (G * (P - Y))^T H      G[i, k] = 1 if k == y_i, g2_k if y_i is rare, else g1_k

G is never built. Tokens are taken in two classes, by "target is rare": within a class the gate is a factor of the rows
of P^T H, applied to [V_local, D] after its chunks and never to [C, V_local]. The target's own entry, which is exempt,
is put right by adding to its row. So the gates cost next to nothing beyond three matmuls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from agg.gating import Gates
from agg.vocab_shard import VocabShard

CHUNK_LOGITS = 2**24  # elements of one chunk of logits: 64 MiB in float32


def gated_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    gates: Gates | None = None,
    shard: VocabShard | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """``cross_entropy(hidden @ weight.T, target)`` whose gradient of ``weight`` passes through ``gates``.

    The forward value is the plain cross-entropy. Logits exist only a chunk at a time; for reductions to a scalar
    the gradients are formed in the same pass. Sums are in float32 at least, whatever the inputs.

    Args:
        hidden: [T, D], the same on all tensor-parallel ranks. Its gradient is complete on each of them.
        weight: [V_local, D], rows ``[shard.start, shard.stop)``. Rows that only pad get no gradient.
        target: int64 [T], global ids or ``ignore_index``, the same on all tensor-parallel ranks.
        gates: of this shard's rows; None is the plain loss.
        shard: which rows ``weight`` holds; None: all of an unpadded, unsplit vocabulary.
        label_smoothing: eps in ``Y' = (1 - eps) Y + eps / V``, V the global unpadded size.
        reduction: ``mean`` over targets that are not ignored (0 if there are none), ``sum``, or ``none`` ([T],
            0 where ignored).
        chunk_tokens: C. None: ``CHUNK_LOGITS`` over the rows of an even shard, at least 128.

    Raises:
        ValueError: shapes, sizes or options that do not fit.
        IndexError: (CPU) a target outside the vocabulary.
        RuntimeError: differentiating twice.
    """
    if shard is None:
        shard = VocabShard(0, max(weight.shape[0], 1), max(weight.shape[0], 1))
    if torch.is_autocast_enabled(hidden.device.type):  # as torch.nn.functional.linear does
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check(hidden, weight, target, gates, shard, label_smoothing, reduction, chunk_tokens)
    if target.device.type == "cpu":
        outside = (target != ignore_index) & ((target < 0) | (target >= shard.vocab_size))
        if bool(outside.any()):
            raise IndexError(f"target {int(target[outside][0])} is outside the vocabulary of {shard.vocab_size} ids")
    if chunk_tokens is None:
        chunk_tokens = max(128, CHUNK_LOGITS // -(-shard.vocab_size // shard.world_size))
    job = _Job(target, gates, shard, ignore_index, label_smoothing, chunk_tokens)
    losses: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, job, reduction)  # type: ignore[no-untyped-call]
    return losses


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    gates: Gates | None,
    shard: VocabShard,
    label_smoothing: float,
    reduction: str,
    chunk_tokens: int | None,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [T, D] and weight [V_local, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target must be [T] with T = {hidden.shape[0]}, got {tuple(target.shape)}")
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must have one floating dtype, got {hidden.dtype} and {weight.dtype}")
    if weight.shape[0] != len(shard):
        raise ValueError(f"weight has {weight.shape[0]} rows, its shard [{shard.start}, {shard.stop}) has {len(shard)}")
    if gates is not None:
        for name in ("rare", "g1", "g2"):
            if getattr(gates, name).shape != (len(shard),):
                raise ValueError(f"gates.{name} has {getattr(gates, name).numel()} rows, the shard has {len(shard)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, must be mean, sum or none")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, must be in [0, 1)")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, must be at least 1")


@dataclass(frozen=True)
class _Job:
    """What stays the same over the chunks of one call."""

    target: torch.Tensor
    gates: Gates | None
    shard: VocabShard
    ignore_index: int
    label_smoothing: float
    chunk_tokens: int

    def positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the positions that count: those whose target is not rare, and those whose target is."""
        valid = self.target != self.ignore_index
        if self.gates is None:
            return valid.nonzero().squeeze(1), self.target[:0]
        rows, here = self.shard.to_local(self.target)
        rare = self.shard.all_reduce((self.gates.rare[rows] & here).to(torch.int32)).bool()
        return (valid & ~rare).nonzero().squeeze(1), (valid & rare).nonzero().squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, job: _Job, reduction: str) -> torch.Tensor:
        ctx.reduction, ctx.job = reduction, job
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if reduction == "none":  # the gradient of each loss is only known in backward
            ctx.save_for_backward(hidden, weight)
            return _Sweep(job, hidden, weight, None, False, False).run().losses.to(_sum_dtype(hidden.dtype))
        valid = (job.target != job.ignore_index).sum().to(_sum_dtype(hidden.dtype))
        scale = 1 / valid.clamp(min=1) if reduction == "mean" else torch.ones_like(valid)
        row_scale = scale.expand(hidden.shape[0])
        sweep = _Sweep(job, hidden, weight, row_scale, needs_hidden, needs_weight).run()
        ctx.gradients = (sweep.hidden_grad, sweep.weight_grad)
        return sweep.losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, loss_grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("gated_linear_cross_entropy cannot be differentiated twice (create_graph=True)")
        if ctx.reduction == "none":
            hidden, weight = ctx.saved_tensors
            row_scale = loss_grad.to(_sum_dtype(hidden.dtype))
            sweep = _Sweep(ctx.job, hidden, weight, row_scale, *ctx.needs_input_grad[:2]).run()
            return sweep.hidden_grad, sweep.weight_grad, None, None
        if ctx.gradients is None:
            raise RuntimeError("backward ran through this loss before; give retain_graph=True to run it again")
        gradients = ctx.gradients
        if _keeps_graph():
            gradients = [None if grad is None else grad.clone() for grad in gradients]
        else:
            ctx.gradients = None  # multiplied in place and handed over: a copy of dW would be the peak of memory
        hidden_grad, weight_grad = (None if grad is None else grad.mul_(loss_grad) for grad in gradients)
        return hidden_grad, weight_grad, None, None


def _keeps_graph() -> bool:
    """Whether the backward pass under way was called with ``retain_graph=True``."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


class _Sweep:
    """One pass over all chunks: losses, and the gradients that are asked for.

    Args:
        row_scale: [T], d(result)/d(loss of a position); None without gradients.
    """

    def __init__(
        self,
        job: _Job,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        row_scale: torch.Tensor | None,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> None:
        self.job, self.hidden, self.row_scale = job, hidden, row_scale
        self.real = weight[: job.shard.real]  # rows that only pad take no part
        self.sum_dtype = _sum_dtype(hidden.dtype)
        self.losses = torch.zeros(hidden.shape[0], dtype=self.sum_dtype, device=hidden.device)
        self._own_p = torch.zeros_like(self.losses)  # P at each position's target; 0 where held elsewhere
        self._hidden_sum = torch.zeros_like(hidden, dtype=self.sum_dtype) if needs_hidden else None
        self._weight_sum = torch.zeros_like(weight, dtype=self.sum_dtype) if needs_weight else None
        self.hidden_grad: torch.Tensor | None = None
        self.weight_grad: torch.Tensor | None = None
        self.smoothing_per_id = job.label_smoothing / job.shard.vocab_size
        self.row_sum = self.real.sum(0, dtype=self.sum_dtype) if job.label_smoothing else None  # local, [D]
        self.row_sum_all = None if self.row_sum is None else job.shard.all_reduce(self.row_sum.clone())

    def run(self) -> _Sweep:
        common, rare = self.job.positions()
        gates = self.job.gates
        longest = min(self.job.chunk_tokens, max(len(common), len(rare)))
        self._logits = self.hidden.new_empty(longest, self.real.shape[0])
        if gates is None:
            self._class(common)
        else:
            between, after = _row_factors(gates, self.sum_dtype)
            self._class(rare)
            if self._weight_sum is not None and len(rare):
                self._weight_sum.mul_(between[:, None])
            self._class(common)
            if self._weight_sum is not None:
                self._weight_sum.mul_(after[:, None])
        if self._weight_sum is not None:
            self._add_target_entries(common, None if gates is None else gates.g1)
            self._add_target_entries(rare, None if gates is None else gates.g2)
            self.weight_grad = self._weight_sum.to(self.hidden.dtype)
        if self._hidden_sum is not None:
            self.hidden_grad = self.job.shard.all_reduce(self._hidden_sum).to(self.hidden.dtype)
        return self

    def _class(self, positions: torch.Tensor) -> None:
        """All chunks of one class of positions: dW gains their ungated ``P^T H``."""
        if len(positions) == 0:
            return
        hidden_total = self.hidden.new_zeros(self.hidden.shape[1], dtype=self.sum_dtype)
        for chunk in positions.split(self.job.chunk_tokens):
            self._chunk(chunk, hidden_total)
        if self.row_sum is not None and self._weight_sum is not None:
            self._weight_sum[: len(self.real)] -= self.smoothing_per_id * hidden_total

    def _chunk(self, chunk: torch.Tensor, hidden_total: torch.Tensor) -> None:
        """Losses of the positions ``chunk`` [C], and their share of the gradients but for ``Y`` in dW."""
        shard, eps = self.job.shard, self.job.label_smoothing
        hidden = self.hidden[chunk]  # [C, D]
        target, here = shard.to_local(self.job.target[chunk])
        logits = torch.mm(hidden, self.real.T, out=self._logits[: len(chunk)])  # [C, real rows]
        local_p, log_norm, factor, own_logit = _softmax_parts(logits, target, here, shard, self.sum_dtype)
        losses = log_norm - own_logit
        self._own_p[chunk] = torch.where(here, (-losses).exp(), 0)
        if self.row_sum_all is not None:
            mean_logit = hidden.to(self.sum_dtype) @ self.row_sum_all / shard.vocab_size
            losses = (1 - eps) * losses + eps * (log_norm - mean_logit)
        self.losses[chunk] = losses
        if self.row_scale is None or len(self.real) == 0:
            return
        scale = self.row_scale[chunk]
        p_scale = (scale * factor)[:, None]  # what the other ranks add to the norm is a factor of rows
        low = local_p.to(self.hidden.dtype)
        if self._hidden_sum is not None:
            part = (low @ self.real).to(self.sum_dtype).mul_(p_scale)
            part -= self.real[target].to(self.sum_dtype) * ((1 - eps) * scale * here)[:, None]
            if self.row_sum is not None:
                part -= self.smoothing_per_id * scale[:, None] * self.row_sum
            self._hidden_sum[chunk] = part
        if self._weight_sum is not None:
            scaled = (hidden.to(self.sum_dtype) * p_scale).to(hidden.dtype)
            if self.sum_dtype == hidden.dtype:
                self._weight_sum[: len(self.real)].addmm_(low.T, scaled)
            else:
                self._weight_sum[: len(self.real)] += low.T @ scaled
            if self.row_sum is not None:
                hidden_total += (hidden.to(self.sum_dtype) * scale[:, None]).sum(0)

    def _add_target_entries(self, positions: torch.Tensor, gate: torch.Tensor | None) -> None:
        """``- Y``, and what the gate took from the target's own entry of P, which is exempt."""
        assert self._weight_sum is not None and self.row_scale is not None
        for chunk in positions.split(self.job.chunk_tokens):
            rows, here = self.job.shard.to_local(self.job.target[chunk])
            coefficient = torch.full_like(self._own_p[chunk], self.job.label_smoothing - 1)
            if gate is not None:
                coefficient += (1 - gate[rows].to(self.sum_dtype)) * (self._own_p[chunk] - self.smoothing_per_id)
            coefficient *= self.row_scale[chunk] * here
            self._weight_sum.index_add_(0, rows, self.hidden[chunk].to(self.sum_dtype) * coefficient[:, None])


def _row_factors(gates: Gates, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors of rows that gate both classes without touching C x V.

    With A_r and A_c the ungated ``P^T H`` of positions whose target is rare and is not,
    ``g2 A_r + g1 A_c = after * (between * A_r + A_c)``: one buffer holds the sums of both.

    Returns:
        between, after: [V_local]. Where g1 is 0 and g2 is not, ``after`` is 2**-60 instead of 0.
    """
    g1, g2 = gates.g1.to(dtype), gates.g2.to(dtype)
    after = torch.where(g2 > 0, g1.clamp(min=2.0**-60), g1)
    return torch.where(after > 0, g2 / after, 1.0), after


def _softmax_parts(
    logits: torch.Tensor, target: torch.Tensor, here: torch.Tensor, shard: VocabShard, sum_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax over a split vocabulary with one collective.

    Args:
        logits: [C, real rows], overwritten. target: local rows [C]. here: whether each is on this rank.

    Returns:
        The softmax over this rank's rows alone, of which P is ``factor`` times; the log of the whole norm [C];
        factor [C]; the target's logit [C].
    """
    if logits.shape[1] == 0:
        local_p = logits.to(sum_dtype)
        own, local_norm = local_p.new_zeros(len(logits)), local_p.new_full((len(logits),), -torch.inf)
    else:
        own = torch.where(here, logits.gather(1, target[:, None]).squeeze(1).to(sum_dtype), 0)
        largest = logits.amax(1).to(sum_dtype)
        # On the CPU in place: a row is read whole before it is written.
        in_place = logits.dtype == sum_dtype and logits.device.type == "cpu"
        local_p = torch.softmax(logits, 1, sum_dtype, out=logits if in_place else None)
        local_norm = largest - local_p.amax(1).log()  # the largest p is 1 / sum(exp(logits - largest))
    if shard.world_size == 1:
        return local_p, local_norm, torch.ones_like(own), own
    gathered = shard.all_gather(torch.stack([local_norm, own]))
    log_norm = gathered[:, 0].logsumexp(0)
    return local_p, log_norm, (local_norm - log_norm).exp(), gathered[:, 1].sum(0)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
