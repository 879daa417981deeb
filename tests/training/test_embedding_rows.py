"""Rows that ZeRO 3 has cut anywhere: every one whole and on one rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from agg import VocabShard
from tests.distributed import run_ranks

WIDTH = 4


def own_rows(rank: int, world_size: int, whole: torch.Tensor) -> tuple[int, int, torch.Tensor, float]:
    from pretrain.training.embedding_rows import _own_rows

    size = -(-whole.numel() // world_size)
    part = torch.full((size,), torch.nan, dtype=whole.dtype)
    values = whole.flatten()[rank * size : (rank + 1) * size]
    part[: len(values)] = values
    part.ds_numel = size
    weight = SimpleNamespace(
        ds_tensor=part,
        ds_shape=whole.shape,
        ds_numel=whole.numel(),
        ds_process_group=dist.group.WORLD,
        ds_zero_partition_rank=rank,
    )
    rows, where = _own_rows(weight, VocabShard(0, len(whole), len(whole) - 1), torch.device("cpu"))
    assert rows.dtype == whole.dtype and len(rows) == len(where)
    real = where.all_reduce(torch.tensor(float(where.real)))
    return where.start, where.stop, rows.float(), float(real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6])
def test_every_row_is_on_one_rank(world_size: int, dtype: torch.dtype) -> None:
    """Seven rows of four: cut at row ends by no number of ranks but one, and six ranks leave the last one short."""
    whole = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = run_ranks(own_rows, world_size, whole)
    assert [start for start, _, _, _ in found] == [0, *(stop for _, stop, _, _ in found)][:-1]
    assert torch.equal(torch.cat([rows for _, _, rows, _ in found]), whole.float())
    assert {real for _, _, _, real in found} == {6.0}
