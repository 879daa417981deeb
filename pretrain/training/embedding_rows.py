"""Rows of the output embedding where they are: under ZeRO 3 each rank's own, without bringing them together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from agg import VocabShard
from pretrain.training.engine import whole_output_embedding


@dataclass(frozen=True)
class OwnRows(VocabShard):
    """Padded ids ``[start, stop)`` of a vocabulary shard that ``partitions`` share; a rank may have none."""

    partitions: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        """Any run of rows will do: the shares are uneven."""

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        dist.all_reduce(tensor, op=op, group=self.partitions)
        return super().all_reduce(tensor, op)


@contextlib.contextmanager
def rows_of_rank(engine: deepspeed.DeepSpeedEngine, shard: VocabShard) -> Iterator[tuple[torch.Tensor, VocabShard]]:
    """Rows [n, D] of the output embedding and which they are; every row of ``shard`` is on a rank, a collective.

    Under ZeRO 3 a rank yields the rows that begin in its partition, and fetches the rest of the last one from the next
    rank. Partitions on NVMe, and those of MiCS, are gathered for the moment.
    """
    weight = engine.module.output_embedding
    if type(engine.optimizer) is DeepSpeedZeroOptimizer_Stage3 and _is_here(weight):
        yield _own_rows(weight, shard, engine.device)
    else:
        with whole_output_embedding(engine) as whole:
            yield whole, shard


def _is_here(weight: Any) -> bool:
    part = weight.ds_tensor
    return part.status is PartitionedParamStatus.AVAILABLE and part.ds_numel >= weight.ds_shape[1]


def _own_rows(weight: Any, shard: VocabShard, device: torch.device) -> tuple[torch.Tensor, OwnRows]:
    """ZeRO 3 cuts the flattened weight evenly, wherever that is in a row."""
    size, total, width = weight.ds_tensor.ds_numel, weight.ds_numel, weight.ds_shape[1]
    group, rank = weight.ds_process_group, weight.ds_zero_partition_rank
    begin, end = min(rank * size, total), min((rank + 1) * size, total)
    first, after = -(-begin // width), -(-end // width)
    part = weight.ds_tensor.detach()[: end - begin].to(device)
    head = torch.zeros(width, device=device)
    head[: len(part)] = part[:width]
    heads = [torch.empty_like(head) for _ in range(dist.get_world_size(group))]
    dist.all_gather(heads, head, group=group)
    rest = heads[rank + 1][: after * width - end] if after * width > end else head[:0]
    rows = torch.cat([part[first * width - begin :], rest.to(part.dtype)]).view(-1, width)
    return rows, OwnRows(shard.start + first, shard.start + after, shard.vocab_size, shard.group, group)
