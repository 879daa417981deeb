"""The tests of the loss can fail: each way of getting it wrong is caught by the comparison they make.

A mutant replaces one function inside ``agg``; :func:`differs` is the check of the other tests, turned around.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

import agg.linear_cross_entropy as module
from agg import Gates, VocabShard, gated_linear_cross_entropy, rarity_gates
from tests.agg.problems import dense_answer, make_problem
from tests.distributed import run_ranks

sweep_run = module._Sweep.run
row_factors = module._row_factors
add_target_entries = module._Sweep._add_target_entries
positions = module._Job.positions


def one_process(**options):
    problem = make_problem()
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    loss = gated_linear_cross_entropy(
        hidden, weight, problem.target, problem.gates, problem.shard(0, 1), chunk_tokens=20, **options
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
        sweep_run(self)
        change(self)
        return self

    return run


def zero_weight_grad(sweep):
    sweep.weight_grad.zero_()


def negate_weight_grad(sweep):
    sweep.weight_grad.neg_()


def negate_hidden_grad(sweep):
    sweep.hidden_grad.neg_()


def gate_hidden_grad(sweep):
    rare = sweep.job.gates.rare[sweep.job.target.clamp(min=0)]
    sweep.hidden_grad[rare] *= 0.5


def no_factors(gates, dtype):
    return tuple(torch.ones_like(gates.g1, dtype=dtype) for _ in range(2))


def g1_for_both(gates, dtype):
    return torch.ones_like(gates.g1, dtype=dtype), gates.g1.to(dtype)


def swapped_gates(gates, dtype):
    return row_factors(Gates(gates.rare, gates.g2, gates.g1), dtype)


def no_exemption(sweep, chunk, gate):
    add_target_entries(sweep, chunk, None)


MUTANTS = {
    "zeroed dW": (module._Sweep, "run", changed_run(zero_weight_grad), "dW"),
    "negated dW": (module._Sweep, "run", changed_run(negate_weight_grad), "dW"),
    "negated dH": (module._Sweep, "run", changed_run(negate_hidden_grad), "dH"),
    "gated dH": (module._Sweep, "run", changed_run(gate_hidden_grad), "dH"),
    "not gated": (module, "_row_factors", no_factors, "dW"),
    "g1 for both classes": (module, "_row_factors", g1_for_both, "dW"),
    "g1 and g2 swapped": (module, "_row_factors", swapped_gates, "dW"),
    "target not exempt": (module._Sweep, "_add_target_entries", no_exemption, "dW"),
    "no target entry": (module._Sweep, "_add_target_entries", lambda self, chunk, gate: None, "dW"),
    "classes swapped": (module._Job, "positions", lambda self: positions(self)[::-1], "dW"),
    "rare positions dropped": (module._Job, "positions", lambda self: (positions(self)[0], self.target[:0]), "dH"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_of_the_loss_is_killed(monkeypatch, name):
    expected = dense_answer(make_problem())
    assert differs(one_process(), expected) == []
    owner, attribute, replacement, where = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, replacement)
    assert where in differs(one_process(), expected)


def test_mutant_that_trains_ignored_positions_is_killed(monkeypatch):
    problem = make_problem(ignored=0.3)

    def everywhere(self):
        _, rare = positions(self)
        return torch.arange(len(self.target)), rare

    def loss():
        hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
        value = gated_linear_cross_entropy(hidden, weight, problem.target, problem.gates, problem.shard(0, 1))
        value.backward()
        return value.detach(), hidden.grad, weight.grad

    assert differs(loss(), dense_answer(problem)) == []
    monkeypatch.setattr(module._Job, "positions", everywhere)
    assert differs(loss(), dense_answer(problem))


def split_answer(rank: int, world_size: int, mutant: str | None):
    problem = make_problem()
    shard = problem.shard(rank, world_size, dist.group.WORLD)
    weight, gates = problem.local(shard)
    if mutant == "shifted shard" and rank == 1:
        shard = VocabShard(shard.start + 1, shard.stop + 1, shard.vocab_size, shard.group)
    if mutant == "dH not reduced":
        reduce = module.VocabShard.all_reduce  # classes of positions are integers, and stay reduced
        module.VocabShard.all_reduce = lambda self, t, *op: t if t.is_floating_point() else reduce(self, t, *op)
    if mutant == "norm of this rank alone":
        alone = VocabShard(shard.start, shard.stop, shard.vocab_size)
        original = module._softmax_parts
        module._softmax_parts = lambda logits, target, here, shard, dtype: original(logits, target, here, alone, dtype)
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
    if not reduce_mean:
        shard = dataclasses.replace(shard, group=None)
    counts = (400 / (1 + torch.arange(512)))[shard.start : shard.stop].long()
    return rarity_gates(counts, tokens=2600, alpha=0.3, reference_batch_tokens=64, shard=shard).g2


def test_mutant_that_drops_the_reduction_of_the_rare_mean_is_killed():
    whole = run_ranks(split_gates, 1, True)[0]
    assert torch.equal(torch.cat(run_ranks(split_gates, 2, True)), whole)
    assert not torch.equal(torch.cat(run_ranks(split_gates, 2, False)), whole)
