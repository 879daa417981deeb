"""Whether the ranks of a job were given what fits together, looked at once, before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from agg.vocab_shard import VocabShard


def compare_ranks(
    shard: VocabShard, data_parallel_group: dist.ProcessGroup | None, settings: Mapping[str, Any]
) -> None:
    """Compare over both groups; a collective of all their ranks.

    Raises:
        ValueError: on all ranks of a group in which something differs, or shards do not follow one another.
    """
    shard.check_whole()
    if dist.is_initialized() and data_parallel_group is None and dist.get_world_size() > shard.world_size:
        warnings.warn(
            f"torch.distributed has {dist.get_world_size()} ranks, but no data_parallel_group was given: each counts "
            "only its own targets. Give the group whose ranks see other parts of the global batch.",
            stacklevel=3,
        )
    rows = {"rows": (shard.start, shard.stop), "vocab_size": shard.vocab_size}
    of_data_parallel = _gathered({**settings, **rows}, data_parallel_group)
    of_tensor_parallel = _gathered({**settings, **rows}, shard.group)
    _expect_same(of_data_parallel, "data-parallel", of_data_parallel[0])
    _expect_same(
        of_tensor_parallel, "tensor-parallel", {key: of_tensor_parallel[0][key] for key in (*settings, "vocab_size")}
    )
    size = len(shard)
    for rank, its in enumerate(of_tensor_parallel):
        if its["rows"] != (rank * size, (rank + 1) * size):
            raise ValueError(
                f"rank {rank} of the tensor-parallel group has rows {_range(its['rows'])} of the vocabulary, where "
                f"{_range((rank * size, (rank + 1) * size))} belong"
            )


def _gathered(mine: dict[str, Any], group: dist.ProcessGroup | None) -> list[dict[str, Any]]:
    if group is None or dist.get_world_size(group) == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _expect_same(everyone: list[dict[str, Any]], name: str, first: dict[str, Any]) -> None:
    for rank, its in enumerate(everyone):
        for key, value in first.items():
            if its[key] != value:
                raise ValueError(f"{key} is {value} on rank 0 of the {name} group and {its[key]} on rank {rank}")


def _range(rows: tuple[int, int]) -> str:
    return f"[{rows[0]}, {rows[1]})"
