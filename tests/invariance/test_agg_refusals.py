"""What one tensor-parallel rank refuses is told to all of them, and all go on together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from agg import AdaptiveGradientGating, TokenFrequency, VocabShard, gated_linear_cross_entropy
from tests.agg.problems import make_problem
from tests.distributed import caught, run_ranks
from tests.invariance.agg_layouts import groups


def refused_by_one_tensor_parallel_rank(rank: int, world_size: int, dp: int, what: str):
    dp_group, tp_group = groups(rank, dp, 2)
    problem = make_problem()
    shard = problem.shard(rank % 2, 2, tp_group)
    weight, gates = problem.local(shard)
    module = AdaptiveGradientGating(shard, alpha=0.3, window_steps=2, data_parallel_group=dp_group)
    hidden, target, one = problem.hidden, problem.target, rank == 1
    if what == "shape":
        first = caught(lambda: module(hidden[:, :9] if one else hidden, weight, target))
    if what == "after begin_step":
        module.begin_step(target)
        first = caught(lambda: module(hidden, weight[:9] if one else weight, target))
    if what == "gates":
        gates = make_problem().gates if one else gates
        first = caught(lambda: gated_linear_cross_entropy(hidden, weight, target, gates, shard))
    if what.startswith("id") and one:
        target = torch.where(target >= 0, target + 507, target)
    if what == "id":
        first = caught(lambda: gated_linear_cross_entropy(hidden, weight, target, gates, shard))
    if what == "id, training":
        first = caught(lambda: module(hidden, weight, target))
    if "begin_step" in what and what != "after begin_step":
        module.begin_step(target.double() if one and what.startswith("dtype") else target)
        dist.all_reduce(torch.zeros(3), group=tp_group)  # as the forward pass does
        if what.endswith("and tokens"):  # which on one rank may not make it forget to tell the others
            caught(lambda: module.frequency.tokens)
        if what.endswith("taken back"):
            first = caught(module.undo_step)
        elif what.endswith("and another"):
            first = caught(lambda: module.begin_step(problem.target))
        else:
            first = caught(lambda: module(hidden, weight, problem.target))
        module.begin_step(problem.target)
    if what == "id, eval":
        module.eval()
        first = caught(lambda: module(hidden, weight, target))
        module.train()
    return first, caught(lambda: module(hidden, weight, problem.target)), module.frequency.steps


@pytest.mark.parametrize(
    ("dp", "what", "message"),
    [
        (1, "shape", "ValueError: hidden must be [T, D] and weight [V_local, D], got"),
        (2, "shape", "ValueError: hidden must be [T, D] and weight [V_local, D], got"),
        (1, "after begin_step", "ValueError: weight has 9 rows, its shard [256, 512) has 256"),
        (1, "gates", "ValueError: gates.rare has 512 rows, the shard has 256"),
        (1, "id", "IndexError: target"),
        (1, "id, eval", "IndexError: target"),
        (1, "id, training", "ValueError: {valid} targets of this step are outside the vocabulary of 507 ids"),
        (2, "id, training", "ValueError: {valid} targets of this step are outside the vocabulary of 507 ids"),
        *(
            (dp, f"{what}, begin_step{then}", message)
            for dp in (1, 2)
            for what, message in (
                ("id", "ValueError: {valid} targets of this step are outside the vocabulary of 507 ids"),
                ("dtype", "TypeError: targets must be integer ids, got torch.float64"),
            )
            for then in ("", " and tokens", " and another", " taken back")
        ),
    ],
)
def test_what_one_tensor_parallel_rank_refuses(dp, what, message):
    beside = "ValueError: 1 tensor-parallel ranks could not take part in this step; their own messages say why"
    across = "ValueError: 1 data-parallel ranks could not take part in this step; their own messages say why"
    message = message.format(valid=int((make_problem().target >= 0).sum()))
    told = [beside, message, beside, message if what.startswith("id") else across]
    parts = run_ranks(refused_by_one_tensor_parallel_rank, 2 * dp, dp, what)
    for expected, (first, then, steps) in zip(told, parts, strict=False):
        assert first.startswith(expected)
        assert (then, steps) == ("no error", 1)


def counts_after_a_refused_step(rank: int, world_size: int, is_read: bool):
    """Of counts that are used without the module: nobody asks for those of all shards."""
    frequency = TokenFrequency(VocabShard(256 * rank, 256 * rank + 256, 507, dist.group.WORLD), 2)
    frequency.update(torch.tensor([3, 507]))
    if is_read:
        told = [caught(lambda: frequency.tokens) for _ in range(2)]
    else:
        told = [caught(lambda: frequency.update(torch.tensor([4])))]
    frequency.update(torch.tensor([3, 4]))
    return told, int(frequency.tokens), frequency.steps


@pytest.mark.parametrize("is_read", [True, False])
def test_counts_alone_go_on_after_a_refused_step(is_read):
    message = "ValueError: 1 targets of this step are outside the vocabulary of 507 ids"
    told = [message] * (2 if is_read else 1)
    assert run_ranks(counts_after_a_refused_step, 2, is_read) == [(told, 2, 1)] * 2
