"""Cross-entropy of a linear projection: chunked, vocabulary-parallel, its weight gradient gated.

Letters: T tokens, C tokens of a chunk, D hidden size, V vocabulary, V_local rows of this rank's shard,
R tensor-parallel ranks; H [T, D] hidden states, W [V_local, D] output embedding, P softmax, Y one-hot targets.

    dL/dH = (P - Y) W              not gated
    dL/dW = (G * (P - Y))^T H      G[i, k] = 1 if k == y_i, g2_k if y_i is rare, else g1_k

G is never built. Tokens are taken in two classes, by "target is rare": within a class the gate is a factor of the rows
of P^T H, applied to [V_local, D] and not to each [C, V_local]. So the gates cost next to nothing beyond three matmuls.
The target's own entry, which is exempt, is 0 in P and added to its row apart, in float32: in 16 bits P near 1 would
leave nothing of P - 1.

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
from agg.job import Job
from agg.probe import LossProbe
from agg.sweep import Sweep, sum_dtype
from agg.vocab_shard import VocabShard

# Where no chunk_tokens are given: PERFORMANCE.md, "Chunk size".
CACHED_LOGITS = 2**22  # on a CPU, of one chunk: 16 MiB in float32
CACHED_TOKENS, CPU_TOKENS = 512, 1024  # measured
GPU_LOGITS, GPU_TOKENS, FEWEST_GPU_TOKENS = 2**28, 4096, 256  # 512 MiB in bfloat16


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
    the inputs; P of all ids but the target is in their dtype, and so lost in float16 below 2^-24, which bfloat16 holds.

    Args:
        hidden: [T, D], the same on all tensor-parallel ranks. Its gradient is complete on each of them. Where the
            target is ignored it may hold anything, NaN too.
        weight: [V_local, D], rows ``[shard.start, shard.stop)``. Rows that only pad get no gradient.
        target: int64 [T], global ids or ``ignore_index``, the same on all tensor-parallel ranks.
        gates: of this shard's rows; None is the plain loss.
        shard: which rows ``weight`` holds; None: all of an unpadded, unsplit vocabulary.
        label_smoothing: eps in ``Y' = (1 - eps) Y + eps / V``, V the global unpadded size.
        reduction: ``mean`` over targets that are not ignored (0 if there are none), ``sum``, or ``none`` ([T],
            0 where ignored).
        chunk_tokens: C. None: :func:`default_chunk_tokens`.
        z_loss: c; the gradient is that of the loss plus ``c log^2 Z`` of each position, Z the norm of its softmax.
        soft_cap: logits s are ``soft_cap * tanh(s / soft_cap)``, which costs a second chunk of logits (two in float32
            where inputs have 16 bits); 0: they are as they come.
        probe: is told what the gates take and the loss of each token.

    Raises:
        ValueError: shapes, sizes or options that do not fit, here or on another tensor-parallel rank
            (:meth:`agg.VocabShard.problem_of_any`).
        IndexError: a target outside the vocabulary; on a GPU, where looking would stall it, a device-side assertion.
        RuntimeError: differentiating twice.
    """
    if shard is None:
        shard = VocabShard(0, max(weight.shape[0], 1), max(weight.shape[0], 1))
    hidden, weight = as_under_autocast(hidden, weight)
    problem: Exception | None = None
    try:
        check_options(label_smoothing, chunk_tokens, z_loss, soft_cap)
        check_reduction(reduction)
        check_inputs(hidden, weight, target, shard)
        if gates is not None:
            _check_gates(gates, shard, weight.device)
        if kernels.values_are_at_hand(target):  # else the sweep looks
            _check_targets(target, ignore_index, shard)
    except (IndexError, ValueError) as refused:
        problem = refused
    if (problem := shard.problem_of_any(problem)) is not None:
        raise problem
    if chunk_tokens is None:
        rows = -(-shard.vocab_size // shard.world_size)
        chunk_tokens = default_chunk_tokens(rows, len(hidden), hidden.device.type)
    job = Job(target, gates, shard, ignore_index, label_smoothing, chunk_tokens, z_loss, soft_cap, probe)
    losses: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, job, reduction, torch.is_grad_enabled()
    )
    return losses


def default_chunk_tokens(rows: int, tokens: int, device_type: str) -> int:
    """C where none is given, for so many rows of an even shard: as few chunks as a limit allows, all as long.

    On a CPU the limit is what keeps a chunk of logits in the cache. Where that is less than ``CACHED_TOKENS`` it is
    ``CPU_TOKENS``: all of dW is read and written for each chunk, and with few tokens that costs more than the cache
    saves. On a GPU it is ``GPU_LOGITS``; where those are less than ``GPU_TOKENS``, up to twice as many, and at least
    ``FEWEST_GPU_TOKENS``. Rounded up to a multiple of 32, so that C may exceed the limit by less than that.
    """
    if device_type == "cuda":
        limit = max(GPU_LOGITS // rows, min(GPU_TOKENS, 2 * GPU_LOGITS // rows), FEWEST_GPU_TOKENS)
    else:
        cached = CACHED_LOGITS // rows
        limit = cached if cached >= CACHED_TOKENS else CPU_TOKENS
    chunks = max(1, -(-tokens // limit))
    return max(1, min(tokens, -(-tokens // chunks // 32) * 32))


def as_under_autocast(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the dtype that autocast asks for, where it is on; as torch.nn.functional.linear, which spares float64."""
    if not torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == torch.float64:
        return hidden, weight
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype)


def check_inputs(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, shard: VocabShard) -> None:
    """Shapes, dtypes and rows of one loss call; see :func:`gated_linear_cross_entropy`."""
    if hasattr(weight, "placements"):
        raise ValueError(
            "weight is a sharded DTensor: call the loss inside the forward of the module whose parameters FSDP "
            "gathers, or with tensor parallelism give weight.to_local(), and a VocabShard of its group"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [T, D] and weight [V_local, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if len(devices := {hidden.device, weight.device, target.device}) > 1:
        raise ValueError(f"hidden, weight and target lie on several devices: {', '.join(sorted(map(str, devices)))}")
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target must be [T] with T = {hidden.shape[0]}, got {tuple(target.shape)}")
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must have one floating dtype, got {hidden.dtype} and {weight.dtype}")
    if weight.shape[0] != len(shard):
        raise ValueError(f"weight has {weight.shape[0]} rows, its shard [{shard.start}, {shard.stop}) has {len(shard)}")
    shard.check_whole()


def check_reduction(reduction: str) -> None:
    """See :func:`gated_linear_cross_entropy`."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, must be mean, sum or none")


def check_options(label_smoothing: float, chunk_tokens: int | None, z_loss: float, soft_cap: float) -> None:
    """What does not depend on the call; see :func:`gated_linear_cross_entropy`."""
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, must be in [0, 1)")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, must be at least 1")
    for name, value in (("z_loss", z_loss), ("soft_cap", soft_cap)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, must be 0 (off) or above, and finite")
    if soft_cap and label_smoothing:
        raise ValueError("label_smoothing needs the mean logit, which is not linear in hidden with soft_cap: give one")


def _check_gates(gates: Gates, shard: VocabShard, device: torch.device) -> None:
    if gates.rare.device != device:
        raise ValueError(f"gates are on {gates.rare.device}, weight on {device}: count targets that lie there")
    for name in ("rare", "g1", "g2"):
        if getattr(gates, name).shape != (len(shard),):
            raise ValueError(f"gates.{name} has {getattr(gates, name).numel()} rows, the shard has {len(shard)}")
    padded = shard.world_size * len(shard)
    if gates.rare_ids is not None and gates.rare_ids.shape != (padded,):
        raise ValueError(f"gates.rare_ids has {gates.rare_ids.numel()} ids, all shards have {padded}")
    if gates.rare.dtype != torch.bool or (gates.rare_ids is not None and gates.rare_ids.dtype != torch.bool):
        raise ValueError("gates.rare and gates.rare_ids must be bool")


def outside_vocabulary(target: torch.Tensor, ignore_index: int, shard: VocabShard) -> torch.Tensor:
    """bool, as ``target``: neither an id nor ignored."""
    return (target != ignore_index) & ((target < 0) | (target >= shard.vocab_size))


def _check_targets(target: torch.Tensor, ignore_index: int, shard: VocabShard) -> None:
    outside = outside_vocabulary(target, ignore_index, shard)
    if bool(outside.any()):
        raise IndexError(f"target {int(target[outside][0])} is outside the vocabulary of {shard.vocab_size} ids")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, job: Job, reduction: str, with_gradients: bool
    ) -> torch.Tensor:
        ctx.reduction = reduction
        if reduction == "none":  # the gradient of each loss is only known in backward
            ctx.job = job
            ctx.save_for_backward(hidden, weight)
            return Sweep(job, hidden, weight, None, False, False).run().losses.to(sum_dtype(hidden.dtype))
        # Under no_grad a parameter still says that it needs a gradient.
        needs_hidden, needs_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        sweep = Sweep(job, hidden, weight, None, needs_hidden, needs_weight)
        sums = sweep.run()
        ctx.sums, ctx.scale, loss = sums, None, sums.losses.sum()
        if reduction == "mean":
            ctx.scale = 1 / sweep.positions.valid_count.to(loss.dtype).clamp(min=1)
            loss *= ctx.scale
        return loss

    @staticmethod
    def backward(
        ctx: Any, loss_grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("gated_linear_cross_entropy cannot be differentiated twice (create_graph=True)")
        if ctx.reduction == "none":
            hidden, weight = ctx.saved_tensors
            row_scale = torch.where(ctx.job.valid(), loss_grad.to(sum_dtype(hidden.dtype)), 0)
            job = dataclasses.replace(ctx.job, probe=None)  # it was told in forward
            sums = Sweep(job, hidden, weight, row_scale, *ctx.needs_input_grad[:2]).run()
            return *sums.gradients(row_scale.new_ones(()), keep=False), None, None, None
        if ctx.sums is None:
            raise RuntimeError("backward ran through this loss before; give retain_graph=True to run it again")
        sums, keep = ctx.sums, _keeps_graph()
        if not keep:
            ctx.sums = None
        scale = loss_grad if ctx.scale is None else loss_grad * ctx.scale
        return *sums.gradients(scale, keep), None, None, None


def _keeps_graph() -> bool:
    """Whether the backward pass under way was called with ``retain_graph=True``."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
