"""Penalties and z-loss in the objective, on data-parallel x tensor-parallel ranks, against dense fp64 autograd."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from agg import VocabShard
from pretrain.recipe import ObjectiveRecipe
from pretrain.training.objective import PlainObjective
from pretrain.training.penalties import cosine_penalty, mean_penalty
from tests.agg.problems import make_problem
from tests.distributed import run_ranks
from tests.invariance.agg_layouts import groups


def dense_cosine(weight):
    """The sum over pairs as the paper writes it."""
    units = F.normalize(weight, dim=1)
    cosines = units @ units.T
    return (cosines.sum() - cosines.diagonal().sum()) / len(weight) ** 2


def dense_mean(weight):
    return weight.mean(0).square().sum()


OBJECTIVES = {
    "cosine": ({"cosine_penalty": 0.7}, lambda weight, logits: 0.7 * dense_cosine(weight)),
    "mean": ({"mean_penalty": 3.0}, lambda weight, logits: 3.0 * dense_mean(weight)),
    "z-loss": ({"z_loss": 0.02}, lambda weight, logits: 0.02 * logits.logsumexp(1).square().mean()),
    "all": (
        {"cosine_penalty": 0.7, "mean_penalty": 3.0, "z_loss": 0.02},
        lambda weight, logits: (
            0.7 * dense_cosine(weight) + 3.0 * dense_mean(weight) + 0.02 * logits.logsumexp(1).square().mean()
        ),
    ),
}


def problem():
    """Rows with a common part, so that both penalties pull."""
    made = make_problem(tokens=48, ignored=0.3)
    made.weight.add_(0.4)
    return made


def dense(name: str):
    """The cross-entropy, and gradients of the whole objective, by the mean over valid targets."""
    made = problem()
    hidden, weight = made.hidden.clone().requires_grad_(), made.weight.clone().requires_grad_()
    real, valid = weight[: made.vocab_size], made.target >= 0
    logits = (hidden @ real.T)[valid]
    cross_entropy = F.cross_entropy(logits, made.target[valid])
    (cross_entropy + OBJECTIVES[name][1](real, logits)).backward()
    return cross_entropy.detach(), hidden.grad, weight.grad


def one_rank(rank: int, world_size: int, data_parallel: int, tensor_parallel: int, name: str):
    dp_group, tp_group = groups(rank, data_parallel, tensor_parallel)
    made = problem()
    shard = made.shard(dist.get_rank(tp_group), tensor_parallel, tp_group)
    share = slice(dist.get_rank(dp_group), None, data_parallel)
    hidden, target = made.hidden[share].clone().requires_grad_(), made.target[share]
    weight = made.local(shard)[0].clone().requires_grad_()
    objective = PlainObjective(ObjectiveRecipe(method="mle", **OBJECTIVES[name][0]), shard)
    valid, loss = (made.target >= 0).sum(), torch.zeros((), dtype=torch.float64)
    for micro in torch.arange(len(target)).chunk(2):
        part = objective.loss(hidden[micro], weight, target[micro]) / valid
        part.backward()
        loss += part.detach()
    dist.all_reduce(loss, group=dp_group)
    dist.all_reduce(weight.grad, group=dp_group)
    return shard.start, share.start, loss, hidden.grad, weight.grad


@pytest.mark.parametrize(("data_parallel", "tensor_parallel"), product((1, 2, 4), (1, 2, 4)))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_the_dense_formula(name, data_parallel, tensor_parallel):
    cross_entropy, hidden_grad, weight_grad = dense(name)
    ranks = run_ranks(one_rank, data_parallel * tensor_parallel, data_parallel, tensor_parallel, name)
    for start, share, loss, rank_hidden_grad, rank_weight_grad in ranks:
        assert torch.allclose(loss, cross_entropy, atol=1e-12)
        assert torch.allclose(rank_hidden_grad, hidden_grad[share::data_parallel], atol=1e-12, rtol=0)
        rows = slice(start, start + len(rank_weight_grad))
        assert torch.allclose(rank_weight_grad, weight_grad[rows], atol=1e-12, rtol=0)


def test_each_penalty_matters():
    plain = make_problem(tokens=48, ignored=0.3)
    assert not torch.equal(plain.weight, problem().weight)
    without = one_process_weight_grad({})
    for fields, _ in OBJECTIVES.values():
        assert (one_process_weight_grad(fields) - without).abs().max() > 1e-4


def one_process_weight_grad(fields):
    made = problem()
    weight = made.weight.clone().requires_grad_()
    PlainObjective(ObjectiveRecipe(method="mle", **fields), made.shard(0, 1)).loss(
        made.hidden, weight, made.target
    ).backward()
    return weight.grad


@pytest.mark.parametrize("penalty", [cosine_penalty, mean_penalty])
def test_padding_and_zero_rows_get_nothing_that_is_not_finite(penalty):
    weight = torch.randn(128, 8, requires_grad=True)
    with torch.no_grad():
        weight[3] = 0
        weight[100:] = torch.inf
    loss = penalty(weight, VocabShard(0, 128, 100))
    loss.backward()
    assert loss == 0 and torch.isfinite(weight.grad).all() and not weight.grad[100:].any()
    if penalty is cosine_penalty:
        assert not weight.grad[3].any()


def test_half_precision_sums_in_float32():
    weight = (torch.randn(512, 16, generator=torch.Generator().manual_seed(1)) + 0.5).bfloat16()
    shard = VocabShard(0, 512, 512)
    for penalty in (cosine_penalty, mean_penalty):
        low, high = weight.clone().requires_grad_(), weight.double().requires_grad_()
        penalty(low, shard).backward()
        penalty(high, shard).backward()
        assert (low.grad.double() - high.grad).abs().max() <= 2**-8 * high.grad.abs().max()
