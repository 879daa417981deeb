"""Triton kernels of :mod:`agg.kernels`; importable only where Triton is.

Letters: C tokens of a chunk, V columns of a chunk of logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLUMNS = 4096  # of one program at a time; a row of logits stays in the L2 cache between its two readings


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_rows(logits, target, log_norm, own, stride, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    tl.store(own + row, tl.load(line + tl.load(target + row)).to(tl.float32))
    largest = -float("inf")
    total = 0.0
    for first in range(0, columns, block):
        column = first + tl.arange(0, block)
        x = tl.load(line + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    tl.store(log_norm + row, largest + tl.log(total))
    share = 1 / total  # exp(x - log_norm) would carry the rounding of log_norm
    for first in range(0, columns, block):
        column = first + tl.arange(0, block)
        x = tl.load(line + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        tl.store(line + column, (tl.exp(x - largest) * share).to(logits.dtype.element_ty), mask=column < columns)


@triton.jit  # type: ignore[untyped-decorator]
def _gate_leading_rows(p, gate, count, stride, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(count):
        column = tl.program_id(1) * block + tl.arange(0, block)
        inside = column < columns
        x = tl.load(p + row * stride + column, mask=inside).to(tl.float32) * tl.load(gate + column, mask=inside)
        tl.store(p + row * stride + column, x.to(p.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _scale_rows_if(matrix, factor, condition, stride, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    if tl.load(condition) != 0:
        scale = tl.load(factor + row)
        for first in range(0, columns, block):
            column = first + tl.arange(0, block)
            inside = column < columns
            x = tl.load(matrix + row * stride + column, mask=inside)
            tl.store(matrix + row * stride + column, x * scale, mask=inside)


def softmax_rows_(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`agg.kernels.softmax_rows_`; one program per row. Log of the norm, target's logit: float32 [C]."""
    log_norm = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    own = torch.empty_like(log_norm)
    _softmax_rows[(len(logits),)](
        logits, target.contiguous(), log_norm, own, logits.stride(0), logits.shape[1], block=_block(logits.shape[1])
    )
    return log_norm, own


def gate_leading_rows_(p: torch.Tensor, gate: torch.Tensor, count: torch.Tensor) -> None:
    """See :func:`agg.kernels.gate_leading_rows_`. Programs of the other rows return at once."""
    block = _block(p.shape[1])
    _gate_leading_rows[(len(p), triton.cdiv(p.shape[1], block))](
        p, gate.float(), count, p.stride(0), p.shape[1], block=block
    )


def scale_rows_if_(matrix: torch.Tensor, factor: torch.Tensor, condition: torch.Tensor) -> None:
    """See :func:`agg.kernels.scale_rows_if_`. If not, programs return at once."""
    _scale_rows_if[(len(matrix),)](
        matrix,
        factor.float(),
        condition.to(torch.int32),
        matrix.stride(0),
        matrix.shape[1],
        block=_block(matrix.shape[1]),
    )


def _block(columns: int) -> int:
    return min(_COLUMNS, int(triton.next_power_of_2(columns)))
