"""What is wrong on one rank, or on all, ends on all ranks with one clear error and without a hang."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from agg import AdaptiveGradientGating, TokenFrequency, VocabShard, gated_linear_cross_entropy
from tests.agg.problems import make_problem
from tests.distributed import run_ranks


def caught(function) -> str:
    """The error of ``function`` as text; every rank must come here."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def nan_on_one_rank(rank: int, world_size: int):
    problem = make_problem()
    module = AdaptiveGradientGating(
        problem.shard(0, 1), alpha=0.3, window_steps=2, data_parallel_group=dist.group.WORLD
    )
    hidden = problem.hidden.clone()
    if rank == 1:
        hidden[5, 3] = torch.nan
    loss = module(hidden, problem.weight, problem.target)
    return bool(torch.isfinite(loss)), caught(lambda: module(problem.hidden, problem.weight, problem.target))


def test_nan_hidden_states():
    for rank, (finite, error) in enumerate(run_ranks(nan_on_one_rank, 4)):
        assert finite == (rank != 1)  # as torch's own loss tells
        assert error.startswith("FloatingPointError: the loss of the step before was not finite on 1 data-parallel")


def nan_that_is_skipped(rank: int, world_size: int):
    problem = make_problem()
    module = AdaptiveGradientGating(
        problem.shard(0, 1), alpha=0.3, window_steps=2, data_parallel_group=dist.group.WORLD
    )
    module.begin_step(problem.target)
    module(problem.hidden * (torch.nan if rank else 1), problem.weight, problem.target)
    module.undo_step()
    module.begin_step(problem.target)
    return caught(lambda: module(problem.hidden, problem.weight, problem.target)), module.frequency.steps


def test_a_step_that_is_taken_back_leaves_no_fault():
    assert run_ranks(nan_that_is_skipped, 2) == [("no error", 1)] * 2


def target_outside_on_one_rank(rank: int, world_size: int):
    frequency = TokenFrequency(VocabShard(0, 512, 507), 2, dist.group.WORLD)
    frequency.update(torch.tensor([3, 507 if rank else 4]))
    return caught(lambda: frequency.appearances)


def test_a_target_outside_the_vocabulary():
    for error in run_ranks(target_outside_on_one_rank, 2):
        assert error == "ValueError: 1 targets of this step are outside the vocabulary of 507 ids"


def groups_of_the_wrong_size(rank: int, world_size: int):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[rank // 2]
    return (
        caught(lambda: VocabShard.of_rank(507, rank, 4, mine)),
        caught(lambda: VocabShard(128 * rank, 128 * rank + 128, 507, mine)),
        caught(lambda: VocabShard(256 * (rank % 2), 256 * (rank % 2) + 256, 507, dist.group.WORLD)),
    )


def test_groups_of_the_wrong_size():
    for rank, (by_rank, too_small, too_large) in enumerate(run_ranks(groups_of_the_wrong_size, 4)):
        assert by_rank == "ValueError: world_size is 4, but the group has 2 ranks"
        assert "is not the even share of rank" in too_small
        assert ("is not the even share of rank" in too_large) == (rank > 1)


def shard_without_its_group(rank: int, world_size: int):
    problem = make_problem()
    shard = problem.shard(rank, world_size)
    weight, gates = problem.local(shard)
    return (
        caught(lambda: AdaptiveGradientGating(shard, alpha=0.3, window_steps=2)),
        caught(lambda: gated_linear_cross_entropy(problem.hidden, weight, problem.target, gates, shard)),
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_split_vocabulary_needs_its_group(world_size):
    for errors in run_ranks(shard_without_its_group, world_size):
        for error in errors:
            assert error.startswith("ValueError: the shard [") and "names no group" in error


def sharded_by_fsdp(rank: int, world_size: int):
    problem = make_problem()
    mesh = init_device_mesh("cpu", (world_size,))
    weight = distribute_tensor(problem.weight, mesh, [Shard(0)])
    module = AdaptiveGradientGating(problem.shard(0, 1), alpha=0.3, window_steps=2)
    return caught(lambda: module(problem.hidden, weight, problem.target))


def test_a_weight_that_fsdp_has_not_gathered():
    for error in run_ranks(sharded_by_fsdp, 2):
        assert error.startswith("ValueError: weight is a sharded DTensor: call the loss inside the forward")
