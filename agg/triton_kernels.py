"""Triton kernels of :mod:`agg.kernels`; importable only where Triton is.

Letters: C tokens of a chunk, V columns of a chunk of logits.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

# Columns that one program of the softmax holds. It reads a row twice: with so many warps one program fills a
# multiprocessor of an H100, and the rows under way (132 x 256 KiB at V 128k) stay in the L2 cache in between.
_SOFTMAX_COLUMNS = 32_768
_COLUMNS = 4_096  # of the other kernels
_SCALING_PROGRAMS = 1_024  # share the rows of a matrix, most of which need nothing


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_rows(logits, target, largest_of, total_of, own, stride, columns, block: tl.constexpr, rest: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    tl.store(own + row, tl.load(line + tl.load(target + row)).to(tl.float32))
    lane = tl.arange(0, block)
    whole = columns // block * block  # a mask keeps loads from being vectorised: only the rest of the columns has one
    largest = -3.4e38  # finite, so that 0 is what it adds to a sum
    total = 0.0
    for first in range(0, whole, block):
        x = tl.load(line + first + lane).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    for first in range(whole, columns, rest):
        column = first + tl.arange(0, rest)
        x = tl.load(line + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    tl.store(largest_of + row, largest)
    tl.store(total_of + row, total)
    share = 1 / total  # exp(x - log of the norm) would carry the rounding of that
    for first in range(whole, columns, rest):
        column = first + tl.arange(0, rest)
        x = tl.load(line + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        tl.store(line + column, (tl.exp(x - largest) * share).to(logits.dtype.element_ty), mask=column < columns)
    for step in range(0, whole, block):
        first = whole - block - step  # what was read last is the likeliest to be in the cache
        x = tl.load(line + first + lane).to(tl.float32)
        tl.store(line + first + lane, (tl.exp(x - largest) * share).to(logits.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _gate_leading_rows(p, gate, count, stride, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(count):
        for first in range(0, columns, block):
            column = first + tl.arange(0, block)
            inside = column < columns
            x = tl.load(p + row * stride + column, mask=inside).to(tl.float32) * tl.load(gate + column, mask=inside)
            tl.store(p + row * stride + column, x.to(p.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _scale_rows_if(matrix, factor, condition, stride, rows, columns, programs, block: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.load(condition) != 0:
        for step in range(0, rows, programs):
            row = tl.program_id(0).to(tl.int64) + step
            if row < rows:
                scale = tl.load(factor + row)
                if scale != 1:
                    for first in range(0, columns, block):
                        column = first + tl.arange(0, block)
                        inside = column < columns
                        x = tl.load(matrix + row * stride + column, mask=inside)
                        tl.store(matrix + row * stride + column, x * scale, mask=inside)


def softmax_rows_(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`agg.kernels.softmax_rows_`; one program per row. All but the softmax, float32 [C]."""
    assert logits.stride(1) == 1
    largest, total, own = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    blocks = softmax_blocks(logits.shape[1])
    with _on_device_of(logits):
        _softmax_rows[(len(logits),)](
            logits,
            target.contiguous(),
            largest,
            total,
            own,
            logits.stride(0),
            logits.shape[1],
            **blocks,
            num_warps=min(max(blocks["block"] // 1024, 4), 32),
        )
    return largest, total, own


def softmax_blocks(columns: int) -> dict[str, int]:
    """Columns at a time: powers of 2, no more than there are."""
    block = min(_SOFTMAX_COLUMNS, 1 << (columns.bit_length() - 1))
    return {"block": block, "rest": min(block, _COLUMNS)}


def gate_leading_rows_(p: torch.Tensor, gate: torch.Tensor, count: torch.Tensor) -> None:
    """See :func:`agg.kernels.gate_leading_rows_`. Programs of the other rows return at once."""
    assert p.stride(1) == 1
    with _on_device_of(p):
        _gate_leading_rows[(len(p),)](p, gate.float(), count, p.stride(0), p.shape[1], block=_block(p.shape[1]))


def scale_rows_if_(matrix: torch.Tensor, factor: torch.Tensor, condition: torch.Tensor) -> None:
    """See :func:`agg.kernels.scale_rows_if_`. Rows whose factor is 1 are not read."""
    assert matrix.stride(1) == 1
    programs = min(len(matrix), _SCALING_PROGRAMS)
    with _on_device_of(matrix):
        _scale_rows_if[(programs,)](
            matrix,
            factor.float(),
            condition.to(torch.int32),
            matrix.stride(0),
            len(matrix),
            matrix.shape[1],
            programs,
            block=_block(matrix.shape[1]),
        )


def _block(columns: int) -> int:
    return min(_COLUMNS, int(triton.next_power_of_2(columns)))


def _on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, wherever its arguments are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
