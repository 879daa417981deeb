"""z-loss and soft-capped logits, with and without gates, against autograd over dense logits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from agg import AdaptiveGradientGating, gated_linear_cross_entropy
from tests.agg.problems import Problem, make_problem, weigh
from tests.agg.test_linear_cross_entropy import assert_equal, candidate
from tests.distributed import run_ranks

OPTIONS = [
    {"z_loss": 0.03},
    {"z_loss": 0.03, "label_smoothing": 0.1},
    {"soft_cap": 2.0},  # logits reach 15, so most are far into the bend
    {"soft_cap": 30.0, "z_loss": 0.03},
]


def dense(
    problem: Problem, gated: bool, reduction="mean", z_loss=0.0, soft_cap=0.0, label_smoothing=0.0, chunk_tokens=None
):
    """Loss, dH, dW: the gradient by the logits from autograd, then gates as factors of its entries."""
    weight = problem.weight[: problem.vocab_size]
    logits = (problem.hidden @ weight.T).requires_grad_()
    capped = soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits
    loss = F.cross_entropy(capped, problem.target, label_smoothing=label_smoothing, reduction=reduction)
    squares = capped.logsumexp(1).square() * (problem.target >= 0)
    if reduction != "none":
        squares = squares.sum() / ((problem.target >= 0).sum() if reduction == "mean" else 1)
    weigh(loss + z_loss * squares).backward()
    gate = torch.ones_like(logits)
    if gated:
        g1, g2 = (g[: problem.vocab_size].double() for g in (problem.gates.g1, problem.gates.g2))
        target = problem.target.clamp(min=0)
        gate = torch.where(problem.gates.rare[target][:, None], g2, g1)
        gate[torch.arange(len(target)), target] = 1
    weight_grad = torch.zeros_like(problem.weight)
    weight_grad[: problem.vocab_size] = (gate * logits.grad).T @ problem.hidden
    return loss.detach(), logits.grad @ weight, weight_grad


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("reduction", "chunk_tokens"), [("mean", None), ("sum", 7), ("none", 31)])
def test_equals_autograd(options, gated, reduction, chunk_tokens):
    problem = make_problem()
    got = candidate(problem, gated, reduction=reduction, chunk_tokens=chunk_tokens, **options)
    assert_equal(got, dense(problem, gated, reduction, **options))


def test_each_option_matters():
    problem = make_problem()
    plain = dense(problem, gated=True)
    for options in OPTIONS:
        other = dense(problem, gated=True, **options)
        assert (other[1] - plain[1]).abs().max() > 1e-3 and (other[2] - plain[2]).abs().max() > 1e-3
    assert torch.equal(dense(problem, True, z_loss=0.03)[0], plain[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"z_loss": 1e-3}, {"soft_cap": 30.0}], ids=str)
def test_error_within_that_of_dense_logits(dtype, options):
    """Error budget: no further from fp64 than autograd over dense logits of the same precision, plus 10 %."""
    problem = make_problem(tokens=256, hidden_size=64)
    truth = dense(problem, True, **options)
    rounded = dataclasses.replace(problem, hidden=problem.hidden.to(dtype), weight=problem.weight.to(dtype))
    hidden, weight = rounded.hidden.clone().requires_grad_(), rounded.weight.clone().requires_grad_()
    logits = hidden @ weight[:507].T
    cap = options.get("soft_cap", 0.0)
    capped = cap * torch.tanh(logits / cap) if cap else logits
    loss = F.cross_entropy(capped.float(), problem.target)
    (loss + options.get("z_loss", 0.0) * capped.float().logsumexp(1)[problem.target >= 0].square().mean()).backward()
    truth_plain = dense(problem, False, **options)
    mine = candidate(problem, True, dtype=dtype, **options)
    unit = torch.finfo(dtype).eps
    for name, got, reference, exact, exact_plain in zip(
        ("loss", "dH", "dW"), mine, (loss, hidden.grad, weight.grad), truth, truth_plain, strict=True
    ):
        scale = exact.abs().max().item()
        error = (got.double() - exact).abs().max().item() / scale
        budget = (reference.double() - exact_plain).abs().max().item() / scale
        assert error <= 1.1 * budget + unit, f"{name}: {error} against {budget} of dense logits"


def one_rank(rank: int, world_size: int, options: dict):
    problem = make_problem()
    shard = problem.shard(rank, world_size, dist.group.WORLD)
    weight, gates = problem.local(shard)
    hidden, weight = problem.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    gated_linear_cross_entropy(hidden, weight, problem.target, gates, shard, chunk_tokens=13, **options).backward()
    loss = gated_linear_cross_entropy(hidden, weight, problem.target, gates, shard, chunk_tokens=13, **options)
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("tensor_parallel", [2, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_split_vocabulary(tensor_parallel, options):
    expected = dense(make_problem(), gated=True, **options)
    ranks = run_ranks(one_rank, tensor_parallel, options)
    whole = torch.cat([grad for *_, grad in ranks])
    for loss, hidden_grad, _ in ranks:
        assert_equal((loss, hidden_grad, whole), expected)


def test_through_the_module():
    problem = make_problem(ignored=0.0)
    module = AdaptiveGradientGating(
        problem.shard(0, 1), alpha=1.0, window_steps=2, excluded_ids=range(507), z_loss=0.03, soft_cap=2.0
    )
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    loss = module(hidden, weight, problem.target)
    loss.backward()
    assert_equal((loss, hidden.grad, weight.grad), dense(problem, gated=False, z_loss=0.03, soft_cap=2.0))
    capped = dense(problem, gated=False, soft_cap=2.0)[0]
    assert torch.allclose(module.eval()(hidden, weight, problem.target), capped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"soft_cap": float("inf")}, "soft_cap is inf"),
        ({"soft_cap": 30.0, "label_smoothing": 0.1}, "give one"),
    ],
)
def test_bad_options(options, message):
    problem = make_problem()
    with pytest.raises(ValueError, match=message):
        gated_linear_cross_entropy(problem.hidden, problem.weight, problem.target, **options)
