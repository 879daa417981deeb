"""The element-wise work of a loss call: Triton on a GPU, torch elsewhere, the same maths.

Counts and conditions stay tensors, so that a GPU never waits for the host, and each function is one launch there: the
host took 1.6 ms to launch the 45 operations of a chunk (PERFORMANCE.md, version 14), more than the matmuls of a small
model take.

Letters: N positions of a call, C of a chunk of them, D hidden size, V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from agg.job import Positions

TINY = 2.0**-60  # for a factor of rows that will be divided by


@functools.cache
def _triton_kernels() -> ModuleType | None:
    try:
        from agg import triton_kernels
    except ImportError:  # Triton is an extra
        return None
    return triton_kernels


def values_are_at_hand(tensor: torch.Tensor) -> bool:
    """Whether reading a value of ``tensor`` stalls nothing."""
    return tensor.device.type == "cpu"


def triton_for(tensor: torch.Tensor) -> ModuleType | None:
    """The Triton kernels, where ``tensor`` is for them."""
    return _triton_kernels() if tensor.device.type == "cuda" and tensor.dtype != torch.float64 else None


def mixed_addmm_for(tensor: torch.Tensor) -> bool:
    """Whether torch multiplies matrices of bfloat16 into one of float32 there."""
    return tensor.device.type == "cuda"


def take_rows(hidden: torch.Tensor, order: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """``hidden[order]`` [C, D], 0 where not ``valid``: what is ignored may be NaN, and 0 times it would be too."""
    triton = triton_for(hidden)
    if triton is not None:
        rows: torch.Tensor = triton.take_rows(hidden, order, valid)
        return rows
    taken = hidden[order]
    if values_are_at_hand(order):  # then the ignored are not among them
        return taken
    return taken.masked_fill_(~valid[:, None], 0)


def softmax_rows_(
    logits: torch.Tensor, target: torch.Tensor, here: torch.Tensor, sum_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of each row, written over ``logits`` in its own dtype, but 0 at the target; sums in ``sum_dtype``.

    Rounded to 16 bits a P near 1 would leave nothing of ``P - 1``, so the entry of the target is added apart.

    Args:
        logits: [C, V_local]; V_local may be 0. target: int64 [C], a column of each row. here: bool [C], whether it is.

    Returns:
        P [C, V_local]; and [3, C]: the largest logit of each row; its ``sum(exp(logits - largest))``, whose log would
        carry the rounding of ``largest``; the logit of the target, 0 where it is not here.
    """
    if logits.shape[1] == 0:
        told = logits.new_zeros(3, len(logits), dtype=sum_dtype)
        told[0] = -torch.inf
        return logits, told
    triton = triton_for(logits)
    if triton is not None:
        return logits, triton.softmax_rows_(logits, target, here)
    column = target[:, None]
    own = torch.where(here, logits.gather(1, column).squeeze(1).to(sum_dtype), 0)
    largest = logits.amax(1).to(sum_dtype)
    # On the CPU in place: a row is read whole before it is written.
    in_place = logits.dtype == sum_dtype and logits.device.type == "cpu"
    p = torch.softmax(logits, 1, sum_dtype, out=logits if in_place else None)
    total = 1 / p.amax(1)  # the largest p is 1 / sum(exp(logits - largest))
    if not in_place:
        logits.copy_(p)
    logits.scatter_(1, column, logits.gather(1, column).masked_fill_(here[:, None], 0))
    return logits, torch.stack([largest, total, own])


def over_shards_(
    terms: torch.Tensor,
    of_ranks: torch.Tensor,
    rank: int,
    chunk: Positions,
    scale: torch.Tensor,
    alone: float,
    z_loss: float,
) -> None:
    """What the rows of a chunk are over the whole vocabulary.

    Args:
        terms: [5, C], overwritten: the loss, 0 where ignored; the log of the norm; what this rank's softmax is to be
            multiplied by to be P; the same for its part of a gradient, so times ``scale * (1 + 2 z_loss log_norm)``;
            the entry of the target in it, ``(P (1 + 2 z_loss log_norm) - alone) * scale`` of P before it is rounded,
            0 where the target is not here.
        of_ranks: [ranks, 3, C] of :func:`softmax_rows_`. rank: this one.
        scale: [C], what each loss counts for.
    """
    triton = triton_for(terms)
    if triton is not None:
        triton.over_shards_(terms, of_ranks, rank, chunk, scale, alone, z_loss)
        return
    largest, total, own = of_ranks.unbind(1)  # [ranks, C] each
    largest_of_all = largest.amax(0)
    norm = (total * (largest - largest_of_all).exp()).sum(0)
    log_norm = largest_of_all + norm.log()
    factor = total[rank] * (largest[rank] - largest_of_all).exp() / norm
    own_p = (own[rank] - largest_of_all).exp() / norm
    more = 1 + 2 * z_loss * log_norm if z_loss else 1.0
    loss, own_entry = log_norm - own.sum(0), torch.where(chunk.here, (own_p * more - alone) * scale, 0)
    of_chunk = (torch.where(chunk.valid, loss, 0), log_norm, factor, scale * factor * more, own_entry)
    torch.stack(of_chunk, out=terms)


def put_hidden_gradient_(
    sums: torch.Tensor,
    product: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    positions: Positions,
    own: torch.Tensor,
) -> None:
    """``sums[order] = product * scale + weight[rows] * own`` for a chunk of positions.

    Args:
        sums: [T, D]. product: [C, D]. scale, own: [C], the latter 0 where not here. weight: [V_local, D].
    """
    triton = triton_for(sums)
    if triton is not None:
        triton.put_hidden_gradient_(sums, product, scale, weight, positions, own)
        return
    part = product.to(sums.dtype).mul_(scale[:, None])
    part += weight[positions.rows].to(sums.dtype) * own[:, None]
    sums[positions.order] = part


def scaled_rows(hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``hidden * scale[:, None]`` in the dtype of ``hidden``, multiplied in that of ``scale``."""
    triton = triton_for(hidden)
    if triton is None:
        return (hidden.to(scale.dtype) * scale[:, None]).to(hidden.dtype)
    out = torch.empty_like(hidden)
    triton.scale_into(out, hidden, None, scale)
    return out


def scale_into(out: torch.Tensor, sums: torch.Tensor, scale: torch.Tensor, of_rows: torch.Tensor | None) -> None:
    """``out = sums * scale``, and times ``of_rows`` [rows], if given; scale is []. ``out`` may be ``sums``."""
    triton = triton_for(sums)
    if triton is not None:
        triton.scale_into(out, sums, scale, of_rows)
    else:
        torch.mul(sums, scale if of_rows is None else (of_rows * scale)[:, None], out=out)


def gate_at_turn_(p: torch.Tensor, gate: torch.Tensor, rare_count: torch.Tensor, first: int) -> None:
    """``p[:n] *= gate``, n the rows of this chunk whose targets are rare, if it is the one in which those end.

    Args:
        p: [C, V_local], of the positions from ``first`` on. gate: [V_local]. rare_count: int64 [], of all positions.
    """
    triton = triton_for(p)
    if triton is not None:
        triton.gate_at_turn_(p, gate, rare_count, first)
    elif values_are_at_hand(rare_count):
        leading_rows = int(rare_count) - first
        if leading_rows <= len(p):
            p[: max(0, leading_rows)] *= gate.to(p.dtype)
    else:
        count = rare_count - first
        leading = (torch.arange(len(p), device=p.device)[:, None] < count) & (count <= len(p))
        p *= torch.where(leading, gate.to(p.dtype), 1)


def scale_at_turn_(matrix: torch.Tensor, factor: torch.Tensor, rare_count: torch.Tensor, first: int, size: int) -> None:
    """``matrix *= factor[:, None]`` at the same turn: if the rare targets end in the ``size`` positions from ``first``.

    Args:
        matrix: [V_local, D]. factor: [V_local], of which many may be 1.
    """
    triton = triton_for(matrix)
    if triton is not None:
        triton.scale_at_turn_(matrix, factor, rare_count, first, size)
        return
    is_turn = (rare_count > first) & (rare_count <= first + size)
    if not values_are_at_hand(is_turn):
        matrix *= torch.where(is_turn, factor, 1)[:, None]
    elif bool(is_turn):
        (rows,) = (factor != 1).nonzero(as_tuple=True)
        if 8 * len(rows) > len(factor):  # a copy of so many rows would be the peak of memory
            matrix *= factor[:, None]
        else:
            matrix[rows] *= factor[rows, None]


def add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, anew: bool) -> None:
    """``total += left @ right``, or ``total = left @ right`` if ``anew``, summed in the dtype of ``total``.

    Args:
        total: [V_local, D], float32 at least. left: [V_local, C] and right: [C, D], of one dtype.
        anew: ``total`` holds nothing yet.
    """
    beta = 0 if anew else 1  # a total that is multiplied by 0 is not read
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif mixed_addmm_for(total):  # the sum of the products is not rounded on its way
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), beta=beta, out=total)


def add_entries_(
    matrix: torch.Tensor,
    after: torch.Tensor | None,
    hidden: torch.Tensor,
    positions: Positions,
    coefficient: torch.Tensor,
    chunk_tokens: int,
) -> torch.Tensor | None:
    """``matrix[rows] += hidden[order] * coefficient / factor[rows]`` where ``here``, in the same order in each run.

    Args:
        matrix: [V_local, D]. hidden: [T, D]. coefficient: [N], 0 where not here.
        after: [V_local], what the rows are to be multiplied by when all is added; may be overwritten.

    Returns:
        factor [V_local]: ``after``, but at least ``TINY`` where something was added, as it was divided by it.
    """
    triton = triton_for(matrix)
    if triton is not None:
        triton.add_entries_(matrix, after, hidden, positions, coefficient)
        return after
    rows, here, factor = positions.rows, positions.here, None
    if after is not None:
        own = after[rows].clamp_(min=TINY)
        coefficient = coefficient / own
        place = torch.where(here, rows, len(after))
        factor = torch.cat([after, after.new_ones(1)]).index_put_((place,), own)[:-1]
    for chunk in torch.arange(len(rows), device=rows.device).split(chunk_tokens):
        entries = take_rows(hidden, positions.order[chunk], positions.valid[chunk]).to(matrix.dtype)
        _add_rows(matrix, rows[chunk], entries.mul_(coefficient[chunk][:, None]))
    return factor


def _add_rows(matrix: torch.Tensor, rows: torch.Tensor, entries: torch.Tensor) -> None:
    if values_are_at_hand(rows):
        matrix.index_add_(0, rows, entries)
    else:  # index_add_ would add them as they come
        matrix.index_put_((rows,), entries, accumulate=True)
