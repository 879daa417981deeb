"""Triton kernels of :mod:`agg.kernels` on hidden states and rows of dW, and of :mod:`agg.job`.

Letters: T tokens of a call, N positions of them that are taken, C of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from agg.kernels import TINY

if TYPE_CHECKING:
    from agg.job import Positions
    from agg.vocab_shard import VocabShard

_COLUMNS = 4_096  # that one program holds
_SCALING_PROGRAMS = 1_024  # share the rows of a matrix, most of which need nothing
_POSITIONS = 256  # of a program that takes several
_EQUAL, _ENTRY_COLUMNS = 32, 512  # positions of one target at a time, and columns
_FACTORS = 1_024  # rows at a time
_TINY = tl.constexpr(TINY)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _keys_of_targets(keys, fits, target, rare_ids, size, ignore_index, count, gated: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < count
    token = tl.load(target + place, mask=inside, other=0)
    known = (token >= 0) & (token < size)
    taken = known & (token != ignore_index)
    rare = taken & (token < 0)  # none
    if gated:
        rare = tl.load(rare_ids + token, mask=inside & taken, other=0) != 0
    key = tl.where(taken, tl.where(rare, token, token + size), 2 * size)
    tl.store(keys + place, key.to(tl.int32), mask=inside)
    bad = inside & (token != ignore_index) & ~known
    if tl.max(bad.to(tl.int32), 0) > 0:
        tl.store(fits, 0)


@triton.jit(do_not_specialize=["start", "stop", "count"])  # type: ignore[untyped-decorator]
def _positions_of_keys(rows, here, valid, ends, keys, size, start, stop, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < count
    key = tl.load(keys + place, mask=inside, other=0)
    rare = key < size
    token = tl.where(rare, key, key - size)
    taken = key < 2 * size
    is_here = taken & (token >= start) & (token < stop)
    tl.store(rows + place, tl.where(is_here, token - start, 0).to(tl.int64), mask=inside)
    tl.store(here + place, is_here, mask=inside)
    tl.store(valid + place, taken, mask=inside)
    # One place of all says where the rare ones end, and one where those that are taken do.
    before = tl.load(keys + place - 1, mask=inside & (place > 0), other=0)
    tl.store(ends + place * 0, place.to(tl.int64), mask=inside & ~rare & (before < size))
    tl.store(ends + 1 + place * 0, place.to(tl.int64), mask=inside & ~taken & (before < 2 * size))
    last = inside & (place == count - 1)
    tl.store(ends + place * 0, place.to(tl.int64) + 1, mask=last & rare)
    tl.store(ends + 1 + place * 0, place.to(tl.int64) + 1, mask=last & taken)


@triton.jit  # type: ignore[untyped-decorator]
def _take_rows(out, hidden, order, valid, row_stride, column_stride, columns, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    source = hidden + tl.load(order + row) * row_stride
    taken = tl.load(valid + row) != 0
    for first in range(0, columns, block):
        column = first + tl.arange(0, block)
        x = tl.load(source + column.to(tl.int64) * column_stride, mask=(column < columns) & taken, other=0.0)
        tl.store(out + row * columns + column, x, mask=column < columns)


@triton.jit  # type: ignore[untyped-decorator]
def _put_hidden_gradient(  # type: ignore[no-untyped-def]
    sums, product, scale, weight, order, rows, own, weight_stride, weight_column, columns, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = sums + tl.load(order + row) * columns
    own_row = weight + tl.load(rows + row) * weight_stride
    of_product = tl.load(scale + row)
    of_own = tl.load(own + row)
    for first in range(0, columns, block):
        column = first + tl.arange(0, block)
        inside = column < columns
        x = tl.load(product + row * columns + column, mask=inside).to(tl.float32) * of_product
        x += tl.load(own_row + column.to(tl.int64) * weight_column, mask=inside).to(tl.float32) * of_own
        tl.store(target + column, x, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _scale_into(  # type: ignore[no-untyped-def]
    out, sums, of_rows, scale, columns, has_rows: tl.constexpr, has_scale: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    factor = 1.0
    if has_rows:
        factor = tl.load(of_rows + row)
    if has_scale:
        factor = factor * tl.load(scale)
    for first in range(0, columns, block):
        column = first + tl.arange(0, block)
        x = tl.load(sums + row * columns + column, mask=column < columns).to(tl.float32)
        tl.store(out + row * columns + column, (x * factor).to(out.dtype.element_ty), mask=column < columns)


@triton.jit  # type: ignore[untyped-decorator]
def _row_factors(between, after, g1, g2, least, rows, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * block + tl.arange(0, block)
    first = tl.load(g1 + row, mask=row < rows, other=1.0).to(tl.float32)
    second = tl.load(g2 + row, mask=row < rows, other=1.0).to(tl.float32)
    last = tl.where(second > 0, tl.maximum(first, least), first)
    tl.store(after + row, last, mask=row < rows)
    tl.store(between + row, tl.where(last > 0, second / tl.where(last > 0, last, 1.0), 1.0), mask=row < rows)


@triton.jit(do_not_specialize=["begin", "size"])  # type: ignore[untyped-decorator]
def _scale_at_turn(matrix, factor, rare_count, begin, size, rows, columns, programs, block: tl.constexpr):  # type: ignore[no-untyped-def]
    count = tl.load(rare_count) - begin
    if (count > 0) & (count <= size):
        for step in range(0, rows, programs):
            row = tl.program_id(0).to(tl.int64) + step
            if row < rows:
                scale = tl.load(factor + row)
                if scale != 1:
                    for first in range(0, columns, block):
                        column = first + tl.arange(0, block)
                        inside = column < columns
                        x = tl.load(matrix + row * columns + column, mask=inside)
                        tl.store(matrix + row * columns + column, x * scale, mask=inside)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def _add_entries(  # type: ignore[no-untyped-def]
    matrix,
    after,
    hidden,
    order,
    rows,
    here,
    coefficient,
    row_stride,
    column_stride,
    count,
    columns,
    gated: tl.constexpr,
    equal: tl.constexpr,
    block: tl.constexpr,
):
    begin = tl.program_id(0)
    row = tl.load(rows + begin)
    before = tl.maximum(begin - 1, 0)
    follows = (begin > 0) & (tl.load(here + before) != 0) & (tl.load(rows + before) == row)
    leads = (tl.load(here + begin) != 0) & (follows == 0)  # then this program takes all positions of this target
    column = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    goes_on = leads
    first = begin
    while goes_on:
        place = first + tl.arange(0, equal)
        same = (place < count) & (tl.load(here + place, mask=place < count, other=0) != 0)
        same = same & (tl.load(rows + place, mask=same, other=-1) == row)
        source = hidden + tl.load(order + place, mask=same, other=0)[:, None] * row_stride
        inside = same[:, None] & (column < columns)[None, :]
        place_of_column = column.to(tl.int64)[None, :] * column_stride
        entry = tl.load(source + place_of_column, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(entry * tl.load(coefficient + place, mask=same, other=0.0)[:, None], 0)
        goes_on = tl.min(same.to(tl.int32), 0) == 1
        first += equal
    if leads:
        if gated:
            factor = tl.maximum(tl.load(after + row), _TINY)
            tl.store(after + row, factor)  # programs of other columns store the same
            total = total / factor
        line = matrix + row * columns + column
        tl.store(line, tl.load(line, mask=column < columns) + total, mask=column < columns)


def keys_of_targets(target: torch.Tensor, rare_ids: torch.Tensor | None, size: int, ignore_index: int) -> torch.Tensor:
    """int32 [T]: what sorts positions as :class:`agg.job.Positions` tells, ``2 size`` where ignored.

    Raises:
        RuntimeError: on a GPU, where it may end the process, for a target outside the vocabulary of ``size``.
    """
    target, rare_ids = target.contiguous(), rare_ids if rare_ids is None else rare_ids.contiguous()
    keys = torch.empty(len(target), dtype=torch.int32, device=target.device)
    fits = torch.ones((), dtype=torch.bool, device=target.device)
    given = (keys, fits, target, rare_ids, size, ignore_index, len(target))
    if len(target):
        with on_device_of(target):
            _keys_of_targets[(triton.cdiv(len(target), _POSITIONS),)](
                *given, gated=rare_ids is not None, block=_POSITIONS
            )
    torch._assert_async(fits, f"a target is outside the vocabulary of {size} ids")
    return keys


def positions_of_keys(keys: torch.Tensor, shard: VocabShard) -> tuple[torch.Tensor, ...]:
    """All but ``order`` of :class:`agg.job.Positions`, from sorted keys, at least one."""
    rows = torch.empty(len(keys), dtype=torch.int64, device=keys.device)
    here, valid = torch.empty(2, len(keys), dtype=torch.bool, device=keys.device)
    ends = torch.zeros(2, dtype=torch.int64, device=keys.device)
    given = (rows, here, valid, ends, keys, shard.vocab_size, shard.start, shard.stop, len(keys))
    with on_device_of(keys):
        _positions_of_keys[(triton.cdiv(len(keys), _POSITIONS),)](*given, block=_POSITIONS)
    return rows, here, valid, ends[0], ends[1]


def row_factors(g1: torch.Tensor, g2: torch.Tensor, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`agg.sweep.row_factors`; float32."""
    between, after = torch.empty(2, len(g1), dtype=torch.float32, device=g1.device)
    with on_device_of(g1):
        _row_factors[(triton.cdiv(len(g1), _FACTORS),)](
            between, after, g1.contiguous(), g2.contiguous(), least, len(g1), block=_FACTORS
        )
    return between, after


def take_rows(hidden: torch.Tensor, order: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """See :func:`agg.kernels.take_rows`."""
    out = hidden.new_empty(len(order), hidden.shape[1])
    with on_device_of(hidden):
        _take_rows[(len(order),)](
            out, hidden, order, valid, *hidden.stride(), hidden.shape[1], block=_block(hidden.shape[1])
        )
    return out


def put_hidden_gradient_(
    sums: torch.Tensor,
    product: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    positions: Positions,
    own: torch.Tensor,
) -> None:
    """See :func:`agg.kernels.put_hidden_gradient_`."""
    assert sums.is_contiguous() and product.is_contiguous() and scale.is_contiguous() and own.is_contiguous()
    given = (sums, product, scale, weight, positions.order, positions.rows, own, *weight.stride(), sums.shape[1])
    with on_device_of(sums):
        _put_hidden_gradient[(len(positions),)](*given, block=_block(sums.shape[1]))


def scale_into(out: torch.Tensor, sums: torch.Tensor, scale: torch.Tensor | None, of_rows: torch.Tensor | None) -> None:
    """``out = sums * of_rows[:, None] * scale``, without what is None."""
    assert out.is_contiguous() and sums.is_contiguous()
    has = {"has_rows": of_rows is not None, "has_scale": scale is not None}
    if out.numel():
        with on_device_of(sums):
            _scale_into[(len(sums),)](out, sums, of_rows, scale, sums.shape[1], **has, block=_block(sums.shape[1]))


def scale_at_turn_(matrix: torch.Tensor, factor: torch.Tensor, rare_count: torch.Tensor, first: int, size: int) -> None:
    """See :func:`agg.kernels.scale_at_turn_`. Rows whose factor is 1 are not read."""
    assert matrix.is_contiguous()
    programs = min(len(matrix), _SCALING_PROGRAMS)
    given = (matrix, factor.float(), rare_count, first, size, *matrix.shape, programs)
    with on_device_of(matrix):
        _scale_at_turn[(programs,)](*given, block=_block(matrix.shape[1]))


def add_entries_(
    matrix: torch.Tensor,
    after: torch.Tensor | None,
    hidden: torch.Tensor,
    positions: Positions,
    coefficient: torch.Tensor,
) -> None:
    """See :func:`agg.kernels.add_entries_`: one program for each target and some columns; ``after`` is overwritten."""
    assert matrix.is_contiguous() and coefficient.is_contiguous()
    columns = matrix.shape[1]
    block = min(_ENTRY_COLUMNS, _block(columns))
    given = (matrix, after, hidden, positions.order, positions.rows, positions.here, coefficient, *hidden.stride())
    if len(positions) and len(matrix):
        with on_device_of(matrix):
            _add_entries[(len(positions), triton.cdiv(columns, block))](
                *given, len(positions), columns, gated=after is not None, equal=_EQUAL, block=block, num_warps=8
            )


def _block(columns: int) -> int:
    return min(_COLUMNS, int(triton.next_power_of_2(columns)))


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, wherever its arguments are."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()
