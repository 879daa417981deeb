"""Where a built engine keeps the fp32 weights and the Adam state of each parameter, for every ZeRO stage.

``deepspeed.utils.safe_set_full_fp32_param`` and ``safe_set_full_optimizer_state`` are meant for this, but in DeepSpeed
0.19 they do nothing without ZeRO, raise before the first step, when there is no state yet, never find the state of
the second group of parameters under ZeRO 1 and 2 (all are linked after the step of the first), and under
``round_robin_gradients`` they write to wrong places, as ``link_hp_params`` is given the parameters unshuffled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from pretrain.errors import UserError


@dataclass(frozen=True)
class Fragment:
    """Some elements of a parameter on this rank.

    Attributes:
        start, numel: which elements of this rank's tensor-parallel part of the parameter, flattened.
        flat: what Adam updates, float32; it may hold many parameters.
        offset: where in ``flat`` these elements begin.
    """

    name: str
    start: int
    numel: int
    flat: torch.Tensor
    offset: int


def optimizer_fragments(engine: deepspeed.DeepSpeedEngine) -> list[Fragment]:
    """All of this rank's fragments, in the optimizer's order.

    Raises:
        UserError: DeepSpeed made an optimizer of a kind that is not known here, or keeps its state on NVMe.
    """
    optimizer, names = engine.optimizer, engine.param_names
    if engine.zero_nvme_offload_optimizer():
        raise UserError("optimizer state on NVMe cannot be moved to another layout; offload to the CPU instead")
    kind = type(optimizer)
    if kind is torch.optim.AdamW:  # ZeRO 0 in fp32
        whole = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return [Fragment(names[parameter], 0, parameter.numel(), parameter, 0) for parameter in whole]
    if kind is FP16_UnfusedOptimizer:  # ZeRO 0 in bf16
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        pairs = [pair for low_group, high_group in groups for pair in zip(low_group, high_group, strict=True)]
        return [Fragment(names[low], 0, low.numel(), high, 0) for low, high in pairs]
    if kind is BF16_Optimizer:  # ZeRO 1 in bf16
        groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
        offsets = [_begins(parameter.numel() for parameter in group) for group in groups]
    elif kind is DeepSpeedZeroOptimizer:  # ZeRO 1 in fp32, ZeRO 2
        groups, flats = optimizer.round_robin_bit16_groups, optimizer.single_partition_of_fp32_groups
        offsets = optimizer.round_robin_bit16_offsets
    elif kind is DeepSpeedZeroOptimizer_Stage3:
        return list(_stage3_fragments(engine))
    else:
        raise UserError(f"checkpoints cannot be moved to another layout with DeepSpeed's {kind.__name__}")
    rank = dist.get_rank(optimizer.dp_process_group)
    return [
        fragment
        for group, starts, flat in zip(groups, offsets, flats, strict=True)
        for parameter, begin in zip(group, starts, strict=True)
        for fragment in _overlap(names[parameter], begin, parameter.numel(), flat, rank)
    ]


def optimizer_order(engine: deepspeed.DeepSpeedEngine) -> list[str]:
    """Names in the order of Adam's states, which ZeRO 0 saves by number; empty for other stages."""
    return [] if engine.zero_optimization() else [fragment.name for fragment in optimizer_fragments(engine)]


def _begins(lengths: Iterable[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]


def _overlap(name: str, begin: int, numel: int, flat: torch.Tensor, rank: int) -> Iterator[Fragment]:
    """The elements [begin, begin + numel) of a group that is cut evenly over the data-parallel ranks."""
    first, after = rank * flat.numel(), (rank + 1) * flat.numel()
    low, high = max(begin, first), min(begin + numel, after)
    if low < high:
        yield Fragment(name, low - begin, high - low, flat, low - first)


def _stage3_fragments(engine: deepspeed.DeepSpeedEngine) -> Iterator[Fragment]:
    """ZeRO 3 cuts every parameter evenly, and pads each for itself."""
    optimizer = engine.optimizer
    rank = dist.get_rank(optimizer.dp_process_group)
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            start = rank * size
            numel = min(size, parameter.ds_numel - start)
            if numel > 0:
                yield Fragment(engine.param_names[parameter], start, numel, flat, offset)
            offset += size
