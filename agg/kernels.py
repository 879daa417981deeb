"""The element-wise work on one chunk of logits, in place: Triton on a GPU, torch elsewhere, the same maths.

Counts and conditions stay tensors, so that a GPU never waits for the host.

Letters: C tokens of a chunk, V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch


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


def _triton_for(tensor: torch.Tensor) -> ModuleType | None:
    """The Triton kernels, where ``tensor`` is for them."""
    return _triton_kernels() if tensor.device.type == "cuda" and tensor.dtype != torch.float64 else None


def _mixed_addmm_for(tensor: torch.Tensor) -> bool:
    """Whether torch multiplies matrices of bfloat16 into one of float32 there."""
    return tensor.device.type == "cuda"


def softmax_rows_(
    logits: torch.Tensor, target: torch.Tensor, sum_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax of each row, written over ``logits`` in its own dtype; sums in ``sum_dtype``.

    Args:
        logits: [C, V_local]; V_local may be 0. target: int64 [C], a column of each row.

    Returns:
        The softmax [C, V_local]; the largest logit of each row, and its ``sum(exp(logits - largest))``, whose log would
        carry the rounding of ``largest``; the logit in the target's column. All [C].
    """
    if logits.shape[1] == 0:
        own = logits.new_zeros(len(logits), dtype=sum_dtype)
        return logits, torch.full_like(own, -torch.inf), own.clone(), own
    triton = _triton_for(logits)
    if triton is not None:
        return logits, *triton.softmax_rows_(logits, target)
    own = logits.gather(1, target[:, None]).squeeze(1).to(sum_dtype)
    largest = logits.amax(1).to(sum_dtype)
    # On the CPU in place: a row is read whole before it is written.
    in_place = logits.dtype == sum_dtype and logits.device.type == "cpu"
    p = torch.softmax(logits, 1, sum_dtype, out=logits if in_place else None)
    return p.to(logits.dtype), largest, 1 / p.amax(1), own  # the largest p is 1 / sum(exp(logits - largest))


def gate_leading_rows_(p: torch.Tensor, gate: torch.Tensor, count: torch.Tensor) -> None:
    """``p[:count] *= gate`` with p [C, V_local], gate [V_local], count int64 []."""
    if values_are_at_hand(count):
        p[: int(count)] *= gate.to(p.dtype)
    elif (triton := _triton_for(p)) is not None:
        triton.gate_leading_rows_(p, gate, count)
    else:
        leading = torch.arange(len(p), device=p.device)[:, None] < count
        p *= torch.where(leading, gate.to(p.dtype), 1)


def scale_rows_if_(matrix: torch.Tensor, factor: torch.Tensor, condition: torch.Tensor) -> None:
    """``if condition: matrix *= factor[:, None]`` with matrix [V_local, D], factor [V_local], condition bool []."""
    if values_are_at_hand(condition):
        if not bool(condition):
            return
        (rows,) = (factor != 1).nonzero(as_tuple=True)
        if 8 * len(rows) > len(factor):  # a copy of so many rows would be the peak of memory
            matrix *= factor[:, None]
        else:
            matrix[rows] *= factor[rows, None]
    elif (triton := _triton_for(matrix)) is not None:
        triton.scale_rows_if_(matrix, factor, condition)
    else:
        matrix *= torch.where(condition, factor, 1)[:, None]


def add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, anew: bool) -> None:
    """``total += left @ right``, or ``total = left @ right`` if ``anew``, summed in the dtype of ``total``.

    Args:
        total: [V_local, D], float32 at least. left: [V_local, C] and right: [C, D], of one dtype.
        anew: ``total`` holds nothing yet.
    """
    beta = 0 if anew else 1  # a total that is multiplied by 0 is not read
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif _mixed_addmm_for(total):  # the sum of the products is not rounded on its way
        torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), beta=beta, out=total)


def add_rows_(matrix: torch.Tensor, rows: torch.Tensor, entries: torch.Tensor, here: torch.Tensor) -> None:
    """``matrix[rows] += entries`` in the same order in each run.

    Args:
        rows: int64 [T] with repetitions. here: bool [T]; entries of others are 0, and their row is any.
    """
    if _adds_by_sorting(matrix):  # index_add_ would add them as they come
        matrix.index_put_((spread_rows(rows, here, len(matrix)),), entries, accumulate=True)
    else:
        matrix.index_add_(0, rows, entries)


def spread_rows(rows: torch.Tensor, here: torch.Tensor, size: int) -> torch.Tensor:
    """``rows`` where ``here``, else each another one of ``size``: entries of one row are added one after the other."""
    return torch.where(here, rows, torch.arange(len(rows), device=rows.device) % max(1, size))


def _adds_by_sorting(matrix: torch.Tensor) -> bool:
    return matrix.device.type == "cuda"


def logits_buffer(like: torch.Tensor, tokens: int, columns: int) -> torch.Tensor:
    """Empty [tokens, columns]; on a GPU with rows that begin at multiples of 64, as its fast matmuls need them."""
    stride = -(-columns // 64) * 64 if like.device.type == "cuda" else columns
    return like.new_empty(tokens, stride)[:, :columns]
