"""Cross-entropy of a linear projection: chunked, vocabulary-parallel, its weight gradient gated.

Letters: T tokens, C tokens of a chunk, D hidden size, V vocabulary, V_local rows of this rank's shard,
R tensor-parallel ranks; H [T, D] hidden states, W [V_local, D] output embedding, P softmax, Y one-hot targets.

    dL/dH = (P - Y) W              not gated
    dL/dW = (G * (P - Y))^T H      G[i, k] = 1 if k == y_i, g2_k if y_i is rare, else g1_k

G is never built. Tokens are taken in two classes, by "target is rare": within a class the gate is a factor of the rows
of P^T H, applied to [V_local, D] and not to each [C, V_local]. The target's own entry, which is exempt, is put right by
adding to its row. So the gates cost next to nothing beyond three matmuls.

With z-loss (PaLM, arXiv 2204.02311, section 5: ``c log^2 Z``) and soft-capped logits (Gemma 2, arXiv 2408.00118,
section 2: ``z = cap tanh(s / cap)``), ``((1 + 2 c log Z) P - Y) * (1 - tanh^2)`` stands for ``P - Y``, gated the same.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from agg import kernels
from agg.gating import Gates
from agg.probe import LossProbe
from agg.sweep import Job, Sweep, sum_dtype
from agg.vocab_shard import VocabShard

# Elements of one chunk of logits. On a CPU 64 MiB in float32; on a GPU, where each chunk adds to all of dW in memory,
# 1 GiB in bfloat16: 4,096 tokens at V 128k. Below 256 tokens dW is read and written too often for its matmul.
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**29}


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
    z_loss: float = 0.0,
    soft_cap: float = 0.0,
    probe: LossProbe | None = None,
) -> torch.Tensor:
    """``cross_entropy(hidden @ weight.T, target)`` whose gradient of ``weight`` passes through ``gates``.

    The forward value is the plain cross-entropy, whatever the gates and ``z_loss``. Logits exist only a chunk at a
    time; for reductions to a scalar the gradients are formed in the same pass. Sums are in float32 at least, whatever
    the inputs.

    Args:
        hidden: [T, D], the same on all tensor-parallel ranks. Its gradient is complete on each of them.
        weight: [V_local, D], rows ``[shard.start, shard.stop)``. Rows that only pad get no gradient.
        target: int64 [T], global ids or ``ignore_index``, the same on all tensor-parallel ranks.
        gates: of this shard's rows; None is the plain loss.
        shard: which rows ``weight`` holds; None: all of an unpadded, unsplit vocabulary.
        label_smoothing: eps in ``Y' = (1 - eps) Y + eps / V``, V the global unpadded size.
        reduction: ``mean`` over targets that are not ignored (0 if there are none), ``sum``, or ``none`` ([T],
            0 where ignored).
        chunk_tokens: C. None: ``CHUNK_LOGITS`` over the rows of an even shard, at least 256.
        z_loss: c; the gradient is that of the loss plus ``c log^2 Z`` of each position, Z the norm of its softmax.
        soft_cap: logits s are ``soft_cap * tanh(s / soft_cap)``, which costs a second chunk of logits; 0: as they are.
        probe: is told what the gates take and the loss of each token.

    Raises:
        ValueError: shapes, sizes or options that do not fit.
        IndexError: a target outside the vocabulary; on a GPU, where looking would stall it, a device-side assertion.
        RuntimeError: differentiating twice.
    """
    if shard is None:
        shard = VocabShard(0, max(weight.shape[0], 1), max(weight.shape[0], 1))
    if torch.is_autocast_enabled(hidden.device.type):  # as torch.nn.functional.linear does
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check(hidden, weight, target, gates, shard, label_smoothing, reduction, chunk_tokens)
    _check_logit_options(z_loss, soft_cap, label_smoothing)
    _check_targets(target, ignore_index, shard)
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(-(-shard.vocab_size // shard.world_size), hidden.device.type)
    job = Job(target, gates, shard, ignore_index, label_smoothing, chunk_tokens, z_loss, soft_cap, probe)
    losses: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, job, reduction)  # type: ignore[no-untyped-call]
    return losses


def default_chunk_tokens(rows: int, device_type: str) -> int:
    """C where none is given, for so many rows of an even shard."""
    return max(256, CHUNK_LOGITS.get(device_type, 2**24) // rows)


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
    if hasattr(weight, "placements"):
        raise ValueError(
            "weight is a sharded DTensor: call the loss inside the forward of the module whose parameters FSDP gathers"
        )
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
    if shard.world_size == 1 and (shard.start, shard.real) != (0, shard.vocab_size):
        raise ValueError(
            f"the shard [{shard.start}, {shard.stop}) is a part of {shard.vocab_size} ids, but names no group that "
            "holds the others"
        )
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


def _check_logit_options(z_loss: float, soft_cap: float, label_smoothing: float) -> None:
    for name, value in (("z_loss", z_loss), ("soft_cap", soft_cap)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, must be 0 (off) or above, and finite")
    if soft_cap and label_smoothing:
        raise ValueError("label_smoothing needs the mean logit, which is not linear in hidden with soft_cap: give one")


def _check_targets(target: torch.Tensor, ignore_index: int, shard: VocabShard) -> None:
    outside = (target != ignore_index) & ((target < 0) | (target >= shard.vocab_size))
    if not kernels.values_are_at_hand(target):
        torch._assert_async(~outside.any())
    elif bool(outside.any()):
        raise IndexError(f"target {int(target[outside][0])} is outside the vocabulary of {shard.vocab_size} ids")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, job: Job, reduction: str) -> torch.Tensor:
        ctx.reduction, ctx.job = reduction, job
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if reduction == "none":  # the gradient of each loss is only known in backward
            ctx.save_for_backward(hidden, weight)
            return Sweep(job, hidden, weight, None, False, False).run().losses.to(sum_dtype(hidden.dtype))
        valid = job.valid()
        count = valid.sum().to(sum_dtype(hidden.dtype))
        scale = 1 / count.clamp(min=1) if reduction == "mean" else torch.ones_like(count)
        row_scale = torch.where(valid, scale, 0)
        sweep = Sweep(job, hidden, weight, row_scale, needs_hidden, needs_weight).run()
        ctx.gradients = (sweep.hidden_grad, sweep.weight_grad)
        return sweep.losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, loss_grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("gated_linear_cross_entropy cannot be differentiated twice (create_graph=True)")
        if ctx.reduction == "none":
            hidden, weight = ctx.saved_tensors
            row_scale = torch.where(ctx.job.valid(), loss_grad.to(sum_dtype(hidden.dtype)), 0)
            job = dataclasses.replace(ctx.job, probe=None)  # it was told in forward
            sweep = Sweep(job, hidden, weight, row_scale, *ctx.needs_input_grad[:2]).run()
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
