"""What is wrong on one rank, or on all, ends on all ranks with one clear error and without a hang."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from agg import AdaptiveGradientGating, DecayedTokenFrequency, TokenFrequency, VocabShard, gated_linear_cross_entropy
from tests.agg.problems import make_problem
from tests.distributed import caught, run_ranks
from tests.invariance.agg_layouts import groups


def nan_on_one_rank(rank: int, world_size: int, explicit: bool):
    problem = make_problem()
    module = AdaptiveGradientGating(
        problem.shard(0, 1), alpha=0.3, window_steps=2, data_parallel_group=dist.group.WORLD
    )
    hidden = problem.hidden.clone()
    if rank == 1:
        hidden[5, 3] = torch.nan

    def step(hidden):
        if explicit:
            module.begin_step(problem.target)
        return module(hidden, problem.weight, problem.target)

    return bool(torch.isfinite(step(hidden))), caught(lambda: step(problem.hidden))


@pytest.mark.parametrize("explicit", [True, False])
def test_nan_hidden_states(explicit):
    for rank, (finite, error) in enumerate(run_ranks(nan_on_one_rank, 4, explicit)):
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


def a_step_that_one_rank_alone_takes_back(rank: int, world_size: int, kind):
    """Without an error its windows would never fit those of the others again."""
    frequency = kind(VocabShard(0, 512, 507), 3, dist.group.WORLD)
    for step in range(5):
        frequency.update(torch.tensor([step, 2 * rank]))
    if rank == 1:
        frequency.undo_update()
    assert frequency.steps == 3

    def count():
        frequency.update(torch.tensor([7]))
        return frequency.tokens

    return caught(count)


@pytest.mark.parametrize("kind", [TokenFrequency, DecayedTokenFrequency])
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_that_is_not_taken_back_on_all_ranks(kind, world_size):
    for error in run_ranks(a_step_that_one_rank_alone_takes_back, world_size, kind):
        assert error.startswith("ValueError: data-parallel ranks have counted different numbers of steps")


def target_outside_on_one_rank(rank: int, world_size: int):
    frequency = TokenFrequency(VocabShard(0, 512, 507), 2, dist.group.WORLD)
    frequency.update(torch.tensor([3, 507 if rank else 4]))
    return caught(lambda: frequency.appearances)


def test_a_target_outside_the_vocabulary():
    for error in run_ranks(target_outside_on_one_rank, 2):
        assert error == "ValueError: 1 targets of this step are outside the vocabulary of 507 ids"


def a_call_that_is_refused_on_one_rank(rank: int, world_size: int):
    problem = make_problem()
    module = AdaptiveGradientGating(
        problem.shard(0, 1), alpha=0.3, window_steps=2, data_parallel_group=dist.group.WORLD
    )
    hidden = problem.hidden[:, :9] if rank == 1 else problem.hidden
    shapes = caught(lambda: module(hidden, problem.weight, problem.target))
    module(problem.hidden, problem.weight, problem.target)  # and all go on together, if they want to
    other = AdaptiveGradientGating(problem.shard(0, 1), alpha=0.3, window_steps=2, data_parallel_group=dist.group.WORLD)

    def count():
        other.begin_step(problem.target.double() if rank == 2 else problem.target)
        return other.current_gates()

    return shapes, module.frequency.steps, caught(count)


def refused_under_two_tensor_parallel_ranks(rank: int, world_size: int, what: str):
    """Both tensor-parallel ranks of the second data-parallel rank get what is wrong, as a trainer would hand it on."""
    dp_group, tp_group = groups(rank, 2, 2)
    problem = make_problem()
    shard = problem.shard(rank % 2, 2, tp_group)
    weight, _ = problem.local(shard)
    module = AdaptiveGradientGating(shard, alpha=0.3, window_steps=2, data_parallel_group=dp_group)
    hidden, target = problem.hidden.clone(), problem.target.clone()
    if rank >= 2 and what == "NaN":
        hidden[target >= 0] = torch.nan
    if rank >= 2 and what == "shape":
        hidden = hidden[:, :9]
    if rank >= 2 and what == "id":
        target[5] = 507
    first = caught(lambda: module(hidden, weight, target))
    return first, caught(lambda: module(problem.hidden, weight, problem.target))


def test_what_is_refused_under_tensor_parallelism():
    others = "ValueError: 1 data-parallel ranks could not take part in this step; their own messages say why"
    for rank, (first, then) in enumerate(run_ranks(refused_under_two_tensor_parallel_ranks, 4, "shape")):
        assert first.startswith("ValueError: hidden must be [T, D]") if rank >= 2 else first == others
        assert then == "no error"
    for first, then in run_ranks(refused_under_two_tensor_parallel_ranks, 4, "id"):
        assert first == "ValueError: 1 targets of this step are outside the vocabulary of 507 ids"
        assert then == "no error"
    for first, then in run_ranks(refused_under_two_tensor_parallel_ranks, 4, "NaN"):
        assert first == "no error"
        assert then.startswith("FloatingPointError: the loss of the step before was not finite on 1 data-parallel")


def gates_of_another_shard(rank: int, world_size: int):
    problem = make_problem()
    shard = problem.shard(rank, world_size, dist.group.WORLD)
    weight, _ = problem.local(shard)
    return caught(lambda: gated_linear_cross_entropy(problem.hidden, weight, problem.target, problem.gates, shard))


def test_gates_of_another_shards_size():
    for error in run_ranks(gates_of_another_shard, 2):
        assert error == "ValueError: gates.rare has 512 rows, the shard has 256"


def test_a_call_that_one_rank_refuses():
    others = "ValueError: 1 data-parallel ranks could not take part in this step; their own messages say why"
    for rank, (shapes, steps, dtype) in enumerate(run_ranks(a_call_that_is_refused_on_one_rank, 4)):
        assert shapes.startswith("ValueError: hidden must be [T, D]") if rank == 1 else shapes == others
        assert dtype == ("TypeError: targets must be integer ids, got torch.float64" if rank == 2 else others)
        assert steps == 1


def settings_that_differ(rank: int, world_size: int, what: str):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    world, mine, other = dist.group.WORLD, pairs[rank // 2], pairs[1 - rank // 2]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    half = VocabShard(256 * (rank % 2), 256 * (rank % 2) + 256, 507, mine)
    build = functools.partial(AdaptiveGradientGating, alpha=0.3, window_steps=2)
    if what == "window":
        return caught(lambda: build(VocabShard(0, 512, 507), window_steps=2 + rank // 3, data_parallel_group=world))
    if what == "option of one":
        return caught(lambda: build(half, alpha=0.3 if rank else -1.0, data_parallel_group=across))
    if what == "one of four":
        return caught(lambda: build(half, label_smoothing=0.1 * (rank // 3), data_parallel_group=across))
    if what == "a text":
        return caught(lambda: build(half, alpha="0.3" if rank == 1 else 0.3, data_parallel_group=across))
    if what == "a function":  # which cannot be sent to other ranks
        return caught(lambda: build(half, z_loss=(lambda: 0.1) if rank == 1 else 0.1, data_parallel_group=across))
    if what == "no ids":
        return caught(lambda: build(half, excluded_ids=("pad", 3) if rank == 2 else (3,), data_parallel_group=across))
    if what == "alpha":
        return caught(lambda: build(half, alpha=0.3 + rank % 2, data_parallel_group=across))
    if what == "group of all ranks":
        return caught(lambda: build(half, data_parallel_group=world))
    if what == "group of others":
        whole = VocabShard(0, 512, 507)
        counting = (lambda: TokenFrequency(half, 2, other)), (lambda: build(whole, data_parallel_group=other))
        return *map(caught, counting), caught(lambda: VocabShard(0, 256, 507, other))
    raise AssertionError(what)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("window", "window_steps is 2 on rank 0 of the data-parallel group and 3 on rank 3"),
        ("alpha", "alpha is 0.3 on rank 0 of the tensor-parallel group and 1.3 on rank 1"),
        ("option of one", "alpha is -1.0, must be above 0"),
        ("a text", "alpha is '0.3', must be a number"),
        ("a function", "z_loss is <function settings_that_differ"),
        ("no ids", "excluded_ids has 'pad', must be whole numbers"),
        ("one of four", "label_smoothing is 0.0 on rank 0 of the data-parallel group and 0.1 on rank 1"),
        ("group of all ranks", "rows is (0, 256) on rank 0 of the data-parallel group and (256, 512) on rank 1"),
    ],
)
def test_settings_that_differ_are_refused_on_all_ranks(what, message):
    told = run_ranks(settings_that_differ, 4, what)
    assert told[0].startswith(f"ValueError: {message}") and told == told[:1] * 4


def test_a_group_without_this_rank():
    for counts, module, shard in run_ranks(settings_that_differ, 4, "group of others"):
        assert counts == module == "ValueError: this rank is not in the data-parallel group that it was given"
        assert shard == "ValueError: this rank is not in the tensor-parallel group that it was given"


def counts_of_its_own(rank: int, world_size: int):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        AdaptiveGradientGating(VocabShard(0, 512, 507), alpha=0.3, window_steps=2)
        AdaptiveGradientGating(VocabShard(0, 512, 507), alpha=0.3, window_steps=2, data_parallel_group=dist.group.WORLD)
    return [str(warning.message) for warning in told]


def test_a_forgotten_data_parallel_group_is_warned_of():
    """It is what makes the published code gate on each rank what that rank alone saw."""
    for told in run_ranks(counts_of_its_own, 2):
        (message,) = told
        assert message.startswith("torch.distributed has 2 ranks, but no data_parallel_group was given")


def copied_with_its_groups(rank: int, world_size: int):
    shard = VocabShard(256 * rank, 256 * rank + 256, 507, dist.group.WORLD)
    frequency = TokenFrequency(VocabShard(0, 512, 507), 2, dist.group.WORLD)
    frequency.update(torch.tensor([3]))
    twin = copy.deepcopy(frequency)
    twin.update(torch.tensor([4]))
    return copy.deepcopy(shard) is shard, int(twin.tokens), int(frequency.tokens)


def test_copies_share_their_groups():
    assert run_ranks(copied_with_its_groups, 2) == [(True, 4, 2)] * 2


def groups_of_the_wrong_size(rank: int, world_size: int):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[rank // 2]
    too_small = VocabShard(128 * rank, 128 * rank + 128, 507, mine)
    too_large = VocabShard(256 * (rank % 2), 256 * (rank % 2) + 256, 507, dist.group.WORLD)
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    build = functools.partial(AdaptiveGradientGating, alpha=0.3, window_steps=2, data_parallel_group=across)
    turned = caught(lambda: VocabShard.of_rank(507, 1 - rank % 2, 2, mine))
    modules = (caught(functools.partial(build, shard)) for shard in (too_small, too_large))
    return caught(lambda: VocabShard.of_rank(507, rank, 4, mine)), turned, *modules


def test_groups_of_the_wrong_size():
    """All four ranks are told, although only two can see that the group is too large."""
    for rank, (by_rank, turned, too_small, too_large) in enumerate(run_ranks(groups_of_the_wrong_size, 4)):
        assert turned == f"ValueError: rank is {1 - rank % 2}, but this is rank {rank % 2} of the group"
        assert by_rank == "ValueError: world_size is 4, but the group has 2 ranks"
        assert "is not the even share of rank" in too_small
        assert "[0, 256) of 507 ids is not the even share of rank 2 in a group of 4" in too_large


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
