"""Counts, gates, loss and gradients on data-parallel x tensor-parallel ranks equal the single-process answer."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from agg import AdaptiveGradientGating, TokenFrequency, VocabShard, gated_linear_cross_entropy, rarity_gates
from tests.agg.problems import dense_answer, make_problem, weigh
from tests.distributed import run_ranks

LAYOUTS = [(1, 2), (1, 4), (2, 1), (4, 1), (2, 2)]  # data-parallel, tensor-parallel


def groups(rank: int, data_parallel: int, tensor_parallel: int):
    """Neighbouring ranks share a tensor-parallel group, as in megatron-core."""
    mine = {}
    for name, ranks_of in (
        ("tp", [[d * tensor_parallel + t for t in range(tensor_parallel)] for d in range(data_parallel)]),
        ("dp", [[d * tensor_parallel + t for d in range(data_parallel)] for t in range(tensor_parallel)]),
    ):
        for ranks in ranks_of:
            group = dist.new_group(ranks)
            if rank in ranks:
                mine[name] = group
    return mine["dp"], mine["tp"]


def step_targets(steps: int = 6, tokens: int = 96, vocab_size: int = 507) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    targets = (vocab_size * torch.rand(steps, tokens, generator=generator) ** 3).long()
    targets[:, ::9] = -100
    targets[2, : tokens // 4] = -100  # with 4 data-parallel ranks one of them has no valid target
    return targets


def whole_gates(window: int = 4):
    shard = VocabShard.of_rank(507, 0, 1)
    frequency = TokenFrequency(shard, window)
    history = []
    for targets in step_targets():
        frequency.update(targets)
        gates = rarity_gates(
            frequency.appearances, tokens=frequency.tokens, alpha=0.5, reference_batch_tokens=64, shard=shard
        )
        history.append((frequency.appearances.clone(), int(frequency.tokens), gates))
    return history


def count_and_gate(rank: int, world_size: int, data_parallel: int, tensor_parallel: int):
    dp_group, tp_group = groups(rank, data_parallel, tensor_parallel)
    shard = VocabShard.of_rank(507, dist.get_rank(tp_group), tensor_parallel, tp_group)
    frequency = TokenFrequency(shard, 4, dp_group)
    history = []
    for targets in step_targets():
        frequency.update(targets.chunk(data_parallel)[dist.get_rank(dp_group)])
        gates = rarity_gates(
            frequency.appearances, tokens=frequency.tokens, alpha=0.5, reference_batch_tokens=64, shard=shard
        )
        history.append((shard.start, frequency.appearances.clone(), int(frequency.tokens), gates))
    return history


@pytest.mark.parametrize(("data_parallel", "tensor_parallel"), LAYOUTS)
def test_counts_and_gates(data_parallel, tensor_parallel):
    expected = whole_gates()
    assert any(gates.rare.any() and gates.g2[gates.rare].lt(1).any() for *_, gates in expected)
    for history in run_ranks(count_and_gate, data_parallel * tensor_parallel, data_parallel, tensor_parallel):
        for (start, appearances, tokens, gates), (all_appearances, all_tokens, all_gates) in zip(
            history, expected, strict=True
        ):
            rows = slice(start, start + len(appearances))
            assert tokens == all_tokens
            assert torch.equal(appearances, all_appearances[rows])
            for name in ("rare", "g1", "g2"):
                assert torch.equal(getattr(gates, name), getattr(all_gates, name)[rows]), name


def one_rank_of_the_loss(rank: int, world_size: int, dtype: torch.dtype, options: dict):
    problem = make_problem()
    shard = problem.shard(rank, world_size, dist.group.WORLD)
    weight, gates = problem.local(shard)
    hidden, weight = problem.hidden.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_()
    loss = gated_linear_cross_entropy(hidden, weight, problem.target, gates, shard, **options)
    weigh(loss).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("tensor_parallel", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "label_smoothing": 0.1, "chunk_tokens": 10},
        {"reduction": "none", "label_smoothing": 0.1, "chunk_tokens": 31},
    ],
)
def test_loss_and_gradients_fp64(tensor_parallel, options):
    loss, hidden_grad, weight_grad = dense_answer(
        make_problem(), **{key: value for key, value in options.items() if key != "chunk_tokens"}
    )
    ranks = run_ranks(one_rank_of_the_loss, tensor_parallel, torch.float64, options)
    for rank_loss, rank_hidden_grad, _ in ranks:
        assert torch.equal(rank_loss, ranks[0][0])
        assert torch.allclose(rank_loss, loss, atol=1e-12, rtol=1e-12)
        assert torch.allclose(rank_hidden_grad, hidden_grad, atol=1e-12, rtol=0)
    assert torch.allclose(torch.cat([grad for *_, grad in ranks]), weight_grad, atol=1e-12, rtol=0)


def whole_step(dtype: torch.dtype):
    """Counts, gates, summed loss and gradients of one global batch in one process."""
    problem = make_problem(tokens=64, ignored=0.0)
    target = layout_targets(problem)
    shard = problem.shard(0, 1)
    frequency = TokenFrequency(shard, 3)
    frequency.update(target)
    gates = rarity_gates(
        frequency.appearances, tokens=frequency.tokens, alpha=1.5, reference_batch_tokens=64, shard=shard
    )
    hidden = problem.hidden.to(dtype, copy=True).requires_grad_()
    weight = problem.weight.to(dtype, copy=True).requires_grad_()
    loss = gated_linear_cross_entropy(hidden, weight, target, gates, shard, reduction="sum")
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, gates


def layout_targets(problem) -> torch.Tensor:
    target = problem.target.clone()
    target[:16] = -100  # the first of four data-parallel ranks has no valid target
    return target


def part_of_step(rank: int, world_size: int, data_parallel: int, tensor_parallel: int, micro_batches: int, dtype):
    dp_group, tp_group = groups(rank, data_parallel, tensor_parallel)
    problem = make_problem(tokens=64, ignored=0.0)
    shard = problem.shard(dist.get_rank(tp_group), tensor_parallel, tp_group)
    target = layout_targets(problem).chunk(data_parallel)[dist.get_rank(dp_group)]
    hidden = problem.hidden.chunk(data_parallel)[dist.get_rank(dp_group)].to(dtype, copy=True).requires_grad_()
    weight = problem.weight[shard.start : shard.stop].to(dtype, copy=True).requires_grad_()
    module = AdaptiveGradientGating(
        shard, alpha=1.5, window_steps=3, reference_batch_tokens=64, data_parallel_group=dp_group
    )
    module.begin_step(target)
    losses = []
    for part, its_target in zip(hidden.chunk(micro_batches), target.chunk(micro_batches), strict=True):
        loss = module(part, weight, its_target, reduction="sum")
        loss.backward()
        losses.append(loss.detach())
    total = torch.stack(losses).sum()
    dist.all_reduce(total, group=dp_group)
    dist.all_reduce(weight.grad, group=dp_group)
    return dist.get_rank(dp_group), shard.start, total, hidden.grad, weight.grad


@pytest.mark.parametrize("data_parallel", [1, 2, 4])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize(("micro_batches", "dtype"), [(1, torch.float64), (4, torch.float64), (2, torch.float32)])
def test_a_step_on_every_layout(data_parallel, tensor_parallel, micro_batches, dtype):
    """fp64 to 1e-12; fp32 within twice the error of the single process against fp64."""
    exact, single = whole_step(torch.float64), whole_step(dtype)
    assert exact[3].rare.any() and not torch.equal(exact[3].g1, torch.ones(512))
    ranks = run_ranks(
        part_of_step, data_parallel * tensor_parallel, data_parallel, tensor_parallel, micro_batches, dtype
    )
    hidden_grads = {dp_rank: hidden_grad for dp_rank, _, _, hidden_grad, _ in ranks}
    weight_grads = {start: weight_grad for _, start, _, _, weight_grad in ranks}
    mine = (
        ranks[0][2],
        torch.cat([hidden_grads[key] for key in sorted(hidden_grads)]),
        torch.cat([weight_grads[key] for key in sorted(weight_grads)]),
    )
    assert all(torch.equal(rank[2], ranks[0][2]) for rank in ranks)
    for got, reference, truth in zip(mine, single, exact, strict=False):
        scale = truth.abs().max()
        error, budget = ((x.double() - truth).abs().max() / scale for x in (got, reference))
        assert error <= (1e-12 if dtype == torch.float64 else 2 * budget + torch.finfo(dtype).eps)


def test_a_rank_that_only_pads():
    """A vocabulary of 100 over four ranks of 64 padded rows leaves two ranks without a real id."""
    results = run_ranks(rank_that_only_pads, 4)
    expected = dense_answer(make_problem(vocab_size=100))
    assert torch.allclose(results[3][0], expected[0], atol=1e-12)
    assert torch.allclose(results[3][1], expected[1], atol=1e-12)
    assert torch.allclose(torch.cat([grad for *_, grad in results])[:128], expected[2], atol=1e-12)


def rank_that_only_pads(rank: int, world_size: int):
    problem = make_problem(vocab_size=100)
    shard = VocabShard(64 * rank, 64 * rank + 64, 100, dist.group.WORLD)
    padded = torch.cat([problem.weight, torch.full((128, 16), 7.0, dtype=torch.float64)])
    gates = problem.gates
    local = type(gates)(*(torch.cat([x, x[:128]])[shard.start : shard.stop] for x in (gates.rare, gates.g1, gates.g2)))
    hidden = problem.hidden.clone().requires_grad_()
    weight = padded[shard.start : shard.stop].clone().requires_grad_()
    loss = gated_linear_cross_entropy(hidden, weight, problem.target, local, shard)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def save_then_continue(rank: int, world_size: int, saved, data_parallel: int, tensor_parallel: int, load_all: bool):
    dp_group, tp_group = groups(rank, data_parallel, tensor_parallel)
    shard = VocabShard.of_rank(507, dist.get_rank(tp_group), tensor_parallel, tp_group)
    frequency = TokenFrequency(shard, 4, dp_group)
    targets = step_targets(12)
    if saved is not None:
        frequency.load_state_dict(saved if load_all else saved[rank])
    for step in targets[:6] if saved is None else targets[6:]:
        frequency.update(step.chunk(data_parallel)[dist.get_rank(dp_group)])
    if saved is None:
        return frequency.state_dict()
    return shard.start, frequency.appearances, int(frequency.tokens)


@pytest.mark.parametrize("before", [(1, 1), (2, 2), (4, 1), (1, 4)])
@pytest.mark.parametrize("after", [(1, 1), (2, 2), (4, 1), (1, 4)])
def test_counts_continue_on_another_layout(before, after):
    saved = run_ranks(save_then_continue, before[0] * before[1], None, *before, True)
    whole = TokenFrequency(VocabShard.of_rank(507, 0, 1), 4)
    for step in step_targets(12):
        whole.update(step)
    for start, appearances, tokens in run_ranks(
        save_then_continue, after[0] * after[1], saved, *after, before != after
    ):
        assert torch.equal(appearances, whole.appearances[start : start + len(appearances)])
        assert tokens == whole.tokens
