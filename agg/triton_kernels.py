"""Triton kernels of :mod:`agg.kernels` on logits; importable only where Triton is.

Letters: N positions of a call, C of a chunk, V columns of a chunk of logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from agg.triton_rows import (
    add_entries_,
    keys_of_targets,
    on_device_of,
    positions_of_keys,
    put_hidden_gradient_,
    row_factors,
    scale_at_turn_,
    scale_into,
    take_rows,
)

__all__ = [
    "add_entries_",
    "gate_at_turn_",
    "keys_of_targets",
    "over_shards_",
    "positions_of_keys",
    "put_hidden_gradient_",
    "row_factors",
    "scale_at_turn_",
    "scale_into",
    "softmax_rows_",
    "take_rows",
]

if TYPE_CHECKING:
    from agg.job import Positions

# Columns that one program of the softmax holds. It reads a row twice: with so many warps one program fills a
# multiprocessor of an H100, and the rows under way (132 x 256 KiB at V 128k) stay in the L2 cache in between.
_SOFTMAX_COLUMNS = 32_768
_COLUMNS = 4_096  # of its rest
_GATED_COLUMNS = 16_384  # few rows are gated at once, so that each has to have much under way
_ROWS = 256  # of a program that takes several


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _softmax_rows(logits, target, here, told, stride, rows, columns, block: tl.constexpr, rest: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    hot = tl.where(tl.load(here + row), tl.load(target + row).to(tl.int32), -1)
    own = tl.load(line + tl.maximum(hot, 0)).to(tl.float32)
    tl.store(told + 2 * rows + row, tl.where(hot >= 0, own, 0.0))
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
    tl.store(told + row, largest)
    tl.store(told + rows + row, total)
    share = 1 / total  # exp(x - log of the norm) would carry the rounding of that
    for first in range(whole, columns, rest):
        column = first + tl.arange(0, rest)
        x = tl.load(line + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        p = tl.where(column == hot, 0.0, tl.exp(x - largest) * share)
        tl.store(line + column, p.to(logits.dtype.element_ty), mask=column < columns)
    for step in range(0, whole, block):
        first = whole - block - step  # what was read last is the likeliest to be in the cache
        x = tl.load(line + first + lane).to(tl.float32)
        p = tl.where(first + lane == hot, 0.0, tl.exp(x - largest) * share)
        tl.store(line + first + lane, p.to(logits.dtype.element_ty))


@triton.jit(do_not_specialize=["stride", "rows", "rank"])  # type: ignore[untyped-decorator]
def _over_shards(  # type: ignore[no-untyped-def]
    terms, of_ranks, here, valid, scale, stride, rows, ranks, rank, alone, z_loss, block: tl.constexpr
):
    row = tl.program_id(0) * block + tl.arange(0, block)
    inside = row < rows
    largest = tl.load(of_ranks + row, mask=inside, other=0.0)
    for other in range(1, ranks):
        largest = tl.maximum(largest, tl.load(of_ranks + 3 * other * rows + row, mask=inside, other=0.0))
    norm = tl.zeros([block], tl.float32)
    own_logit = tl.zeros([block], tl.float32)
    for other in range(0, ranks):
        its = of_ranks + 3 * other * rows + row
        total = tl.load(its + rows, mask=inside, other=1.0)
        norm += total * tl.exp(tl.load(its, mask=inside, other=0.0) - largest)
        own_logit += tl.load(its + 2 * rows, mask=inside, other=0.0)
    mine = of_ranks + 3 * rank * rows + row
    its_share = tl.exp(tl.load(mine, mask=inside, other=0.0) - largest)
    factor = tl.load(mine + rows, mask=inside, other=1.0) * its_share / norm
    own_p = tl.exp(tl.load(mine + 2 * rows, mask=inside, other=0.0) - largest) / norm
    log_norm = largest + tl.log(norm)
    more = 1 + 2 * z_loss * log_norm
    counts_for = tl.load(scale + row, mask=inside, other=0.0)
    taken = tl.load(valid + row, mask=inside, other=0) != 0
    is_here = tl.load(here + row, mask=inside, other=0) != 0
    tl.store(terms + row, tl.where(taken, log_norm - own_logit, 0.0), mask=inside)
    tl.store(terms + stride + row, log_norm, mask=inside)
    tl.store(terms + 2 * stride + row, factor, mask=inside)
    tl.store(terms + 3 * stride + row, counts_for * factor * more, mask=inside)
    own = (own_p * more - alone) * counts_for
    tl.store(terms + 4 * stride + row, tl.where(is_here, own, 0.0), mask=inside)


@triton.jit(do_not_specialize=["begin", "size"])  # type: ignore[untyped-decorator]
def _gate_at_turn(p, gate, rare_count, begin, size, stride, columns, block: tl.constexpr, rest: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    line = p + row * stride
    count = tl.load(rare_count) - begin
    if (count <= size) & (row < count):
        whole = columns // block * block  # as above
        for first in range(0, whole, block):
            column = first + tl.arange(0, block)
            x = tl.load(line + column).to(tl.float32) * tl.load(gate + column)
            tl.store(line + column, x.to(p.dtype.element_ty))
        for first in range(whole, columns, rest):
            column = first + tl.arange(0, rest)
            inside = column < columns
            x = tl.load(line + column, mask=inside).to(tl.float32) * tl.load(gate + column, mask=inside)
            tl.store(line + column, x.to(p.dtype.element_ty), mask=inside)


def softmax_rows_(logits: torch.Tensor, target: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """See :func:`agg.kernels.softmax_rows_`; one program per row. What it returns beside P, float32 [3, C]."""
    assert logits.stride(1) == 1 and target.is_contiguous() and here.is_contiguous()
    told = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    blocks = column_blocks(logits.shape[1])
    with on_device_of(logits):
        _softmax_rows[(len(logits),)](
            logits,
            target,
            here,
            told,
            logits.stride(0),
            *logits.shape,
            **blocks,
            num_warps=min(max(blocks["block"] // 1024, 4), 32),
        )
    return told


def column_blocks(columns: int, most: int = _SOFTMAX_COLUMNS) -> dict[str, int]:
    """Columns at a time, and of what is left: powers of 2, no more than there are."""
    block = min(most, 1 << (columns.bit_length() - 1))
    return {"block": block, "rest": min(block, _COLUMNS)}


def over_shards_(
    terms: torch.Tensor,
    of_ranks: torch.Tensor,
    rank: int,
    chunk: Positions,
    scale: torch.Tensor,
    alone: float,
    z_loss: float,
) -> None:
    """See :func:`agg.kernels.over_shards_`."""
    assert terms.stride(1) == 1 and of_ranks.is_contiguous() and scale.is_contiguous()
    ranks, _, rows = of_ranks.shape
    given = (terms, of_ranks, chunk.here, chunk.valid, scale, terms.stride(0), rows, ranks, rank, alone, z_loss)
    with on_device_of(terms):
        _over_shards[(triton.cdiv(rows, _ROWS),)](*given, block=_ROWS)


def gate_at_turn_(p: torch.Tensor, gate: torch.Tensor, rare_count: torch.Tensor, first: int) -> None:
    """See :func:`agg.kernels.gate_at_turn_`. Programs of the other rows return at once."""
    assert p.stride(1) == 1
    blocks = column_blocks(p.shape[1], _GATED_COLUMNS)
    given = (p, gate.float(), rare_count, first, len(p), p.stride(0), p.shape[1])
    with on_device_of(p):
        _gate_at_turn[(len(p),)](*given, **blocks, num_warps=max(4, blocks["block"] // 1024))
