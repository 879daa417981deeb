"""The comparison of a step on 2 x 2 ranks with the paper's answer can fail: what is wrong on a rank is found there."""

from __future__ import annotations

import dataclasses

import pytest

import agg.module
import agg.sweep
from agg import Gates, VocabShard
from agg.gating import gates_of_counts
from agg.step_counts import StepCounts
from tests.agg.test_mutants import MUTANTS as MUTANTS_OF_THE_LOSS
from tests.distributed import run_ranks
from tests.invariance.agg_layouts import papers_answer, part_of_step, wrong

of_all_ranks = VocabShard.all_reduce
init_counts = StepCounts.__init__


def rare_mean_of_this_rank(counts, candidates, tokens, alpha, reference, shard):
    gates, rows = gates_of_counts(counts, candidates, tokens, alpha, reference, shard), slice(shard.start, shard.stop)
    alone = VocabShard(0, len(shard), 507)
    of_this = gates_of_counts(counts[rows], candidates[rows], tokens, alpha, reference, alone)
    return dataclasses.replace(gates, g2=of_this.g2)


def shifted_gates(*given):
    gates = gates_of_counts(*given)
    return Gates(gates.rare, gates.g1.roll(1), gates.g2.roll(1), gates.rare_ids)


def rare_ids_of_the_other_shard(*given):
    gates = gates_of_counts(*given)
    return dataclasses.replace(gates, rare_ids=gates.rare_ids.roll(len(gates.rare)))


def counts_of_this_rank(self, shard, window_steps, data_parallel_group=None):
    init_counts(self, shard, window_steps, None)


def integers_reduced_alone(self, tensor, *op):
    return tensor if tensor.is_floating_point() else of_all_ranks(self, tensor, *op)


MUTANTS = {
    name: MUTANTS_OF_THE_LOSS[name]
    for name in ("g1 and g2 swapped", "no target is rare", "every target is rare", "target not exempt", "gated dH")
} | {
    "rare mean not reduced": (agg.module, "gates_of_counts", rare_mean_of_this_rank, "dW"),
    "gates of a shifted shard": (agg.module, "gates_of_counts", shifted_gates, "dW"),
    "rare ids of the other shard": (agg.module, "gates_of_counts", rare_ids_of_the_other_shard, "dW"),
    "counts of this rank": (StepCounts, "__init__", counts_of_this_rank, "dW"),
    "dH not reduced": (VocabShard, "all_reduce", integers_reduced_alone, "dH"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_on_ranks_is_killed(monkeypatch, name):
    """In dW or dH itself, not only in the gates that the test also looks at."""
    exact = papers_answer()
    owner, attribute, replacement, where = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, replacement)  # the ranks are forks of this process
    assert where in wrong(run_ranks(part_of_step, 4, 2, 2), exact)


def test_without_a_mutant_nothing_is_wrong():
    assert wrong(run_ranks(part_of_step, 4, 2, 2), papers_answer()) == set()
