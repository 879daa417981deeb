"""The tests of the loss can fail: each way of getting it wrong is caught by the comparison they make.

A mutant replaces one function inside ``agg``; :func:`differs` is the check of the other tests, turned around.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

import agg.sweep as module
from agg import Gates, VocabShard, gated_linear_cross_entropy, rarity_gates
from tests.agg.problems import dense_answer, make_problem
from tests.distributed import run_ranks

sweep_run = module.Sweep.run
row_factors = module.row_factors
add_entries = module.kernels.add_entries_
complete_rows = module.Sweep._complete_rows
softmax_rows = module.kernels.softmax_rows_
softmax_over_shards = module.softmax_over_shards_


def one_process(**options):
    problem = make_problem()
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    loss = gated_linear_cross_entropy(
        hidden, weight, problem.target, problem.gates, problem.shard(0, 1), chunk_tokens=7, **options
    )
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def differs(got, expected) -> list[str]:
    """Names of what is further than 1e-12 from the paper's formula."""
    return [
        name
        for name, one, other in zip(("loss", "dH", "dW"), got, expected, strict=True)
        if not torch.allclose(one, other, rtol=0, atol=1e-12)
    ]


def changed_run(change):
    def run(self):
        sums = sweep_run(self)
        change(self, sums)
        return sums

    return run


def zero_weight_grad(sweep, sums):
    sums.weight.zero_()


def negate_weight_grad(sweep, sums):
    sums.weight.neg_()


def negate_hidden_grad(sweep, sums):
    sums.hidden.neg_()


def gate_hidden_grad(sweep, sums):
    sums.hidden[sweep.job.target_is_rare()] *= 0.5


def no_factors(gates, dtype):
    return tuple(torch.ones_like(gates.g1, dtype=dtype) for _ in range(2))


def g1_for_both(gates, dtype):
    return torch.ones_like(gates.g1, dtype=dtype), gates.g1.to(dtype)


def swapped_gates(gates, dtype):
    return row_factors(Gates(gates.rare, gates.g2, gates.g1), dtype)


def no_exemption(sweep):
    gates, positions = sweep.job.gates, sweep.positions
    gate = torch.where(positions.is_rare(), gates.g2[positions.rows], gates.g1[positions.rows])
    sweep._terms[4] -= (1 - gate) * torch.exp(-sweep._terms[0]) * sweep._scale  # of P at the target
    return complete_rows(sweep)


def gated_target_entry(matrix, after, *rest):
    add_entries(matrix, torch.ones_like(after), *rest)
    return after


def targets_left_in(logits, target, here, sum_dtype):
    own = logits.gather(1, target[:, None])[:, 0].to(sum_dtype)
    p, told = softmax_rows(logits, target, torch.zeros_like(here), sum_dtype)
    told[2] = torch.where(here, own, 0)
    return p, told


def unnormalised(*arguments):
    return softmax_over_shards(*arguments).mul_(1.01)


MUTANTS = {
    "zeroed dW": (module.Sweep, "run", changed_run(zero_weight_grad), "dW"),
    "negated dW": (module.Sweep, "run", changed_run(negate_weight_grad), "dW"),
    "negated dH": (module.Sweep, "run", changed_run(negate_hidden_grad), "dH"),
    "gated dH": (module.Sweep, "run", changed_run(gate_hidden_grad), "dH"),
    "not gated": (module, "row_factors", no_factors, "dW"),
    "g1 for both classes": (module, "row_factors", g1_for_both, "dW"),
    "g1 and g2 swapped": (module, "row_factors", swapped_gates, "dW"),
    "target not exempt": (module.Sweep, "_complete_rows", no_exemption, "dW"),
    "no target entry": (module.kernels, "add_entries_", lambda matrix, after, *_: after, "dW"),
    "target entry not divided by its row's factor": (module.kernels, "add_entries_", gated_target_entry, "dW"),
    "targets counted twice": (module.kernels, "softmax_rows_", targets_left_in, "dW"),
    "no target is rare": (module.Job, "target_is_rare", lambda self: torch.zeros_like(self.target).bool(), "dW"),
    "every target is rare": (module.Job, "target_is_rare", module.Job.valid, "dW"),
    "chunk of the turn not gated": (module.kernels, "gate_at_turn_", lambda *_: None, "dW"),
    "sum before the turn not gated": (module.kernels, "scale_at_turn_", lambda *_: None, "dW"),
    "softmax not normalised": (module, "softmax_over_shards_", unnormalised, "dH"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_the_loss_is_killed(monkeypatch, name):
    expected = dense_answer(make_problem())
    assert differs(one_process(), expected) == []
    owner, attribute, replacement, where = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, replacement)
    assert where in differs(one_process(), expected)


def test_mutant_that_trains_ignored_positions_is_killed(monkeypatch):
    expected = dense_answer(make_problem())
    monkeypatch.setattr(module.Job, "valid", lambda self: torch.ones_like(self.target, dtype=torch.bool))
    assert differs(one_process(), expected) == ["loss", "dH", "dW"]


def split_answer(rank: int, world_size: int, mutant: str | None):
    problem = make_problem()
    shard = problem.shard(rank, world_size, dist.group.WORLD)
    weight, gates = problem.local(shard)
    if mutant == "shifted shard" and rank == 1:
        VocabShard.check_whole = lambda self: None  # which refuses it
        shard = VocabShard(shard.start + 1, shard.stop + 1, shard.vocab_size, shard.group)
    if mutant == "dH not reduced":
        reduce = VocabShard.all_reduce  # classes of positions are integers, and stay reduced
        VocabShard.all_reduce = lambda self, t, *op: t if t.is_floating_point() else reduce(self, t, *op)
    if mutant == "norm of this rank alone":
        alone = VocabShard(shard.start, shard.stop, shard.vocab_size)
        module.softmax_over_shards_ = lambda logits, chunk, job, *rest: softmax_over_shards(
            logits, chunk, dataclasses.replace(job, shard=alone), *rest
        )
    hidden, weight = problem.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = gated_linear_cross_entropy(hidden, weight, problem.target, gates, shard)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("mutant", ["shifted shard", "dH not reduced", "norm of this rank alone"])
def test_mutant_of_the_split_loss_is_killed(mutant):
    expected = dense_answer(make_problem())

    def whole(ranks):
        return ranks[0][0], ranks[0][1], torch.cat([grad for *_, grad in ranks])

    assert differs(whole(run_ranks(split_answer, 2, None)), expected) == []
    assert differs(whole(run_ranks(split_answer, 2, mutant)), expected)


def split_gates(rank: int, world_size: int, reduce_mean: bool):
    shard = VocabShard.of_rank(507, rank, world_size, dist.group.WORLD)
    counts = (400 / (1 + torch.arange(512)))[shard.start : shard.stop].long()
    if not reduce_mean:
        shard = VocabShard(0, len(shard), shard.real)  # as if these rows were all
    return rarity_gates(counts, tokens=2600, alpha=0.3, reference_batch_tokens=64, shard=shard).g2


def test_mutant_that_drops_the_reduction_of_the_rare_mean_is_killed():
    whole = run_ranks(split_gates, 1, True)[0]
    assert torch.equal(torch.cat(run_ranks(split_gates, 2, True)), whole)
    assert not torch.equal(torch.cat(run_ranks(split_gates, 2, False)), whole)
