"""The loss on a vocabulary that tensor-parallel ranks share: dtypes, reductions, how the inputs lie in memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from agg import Gates, VocabShard, gated_linear_cross_entropy
from tests.agg.problems import dense_answer, make_problem, rounded, transposed, weigh, well_predicted
from tests.agg.test_logit_options import dense
from tests.distributed import run_ranks


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


def strided(x: torch.Tensor) -> torch.Tensor:
    """Every second entry of memory twice as wide; what lies between is not to be touched."""
    between = torch.full_like(x, torch.nan) if x.is_floating_point() else torch.full_like(x, 10**9)
    return torch.stack([x, between], -1)[..., 0]


def one_rank_of_the_loss(
    rank: int, world_size: int, dtype: torch.dtype = torch.float64, options: dict | None = None, lay_out=contiguous
):
    problem = make_problem()
    shard = problem.shard(rank, world_size, dist.group.WORLD)
    weight, gates = problem.local(shard)
    hidden, weight = (lay_out(x.to(dtype)).requires_grad_() for x in (problem.hidden, weight))
    target = lay_out(problem.target[None]).squeeze(0)
    loss = gated_linear_cross_entropy(hidden, weight, target, gates, shard, **(options or {}))
    weigh(loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def assert_equal(ranks, expected, tolerance=(1e-12,) * 3) -> None:
    """Loss and dH of every rank, and dW put together, within ``tolerance`` of the largest entry."""
    weight_grad = torch.cat([grad for *_, grad in ranks])
    for loss, hidden_grad, _ in ranks:
        assert torch.equal(loss, ranks[0][0])
        for name, got, exact, allowed in zip(
            ("loss", "dH", "dW"), (loss, hidden_grad, weight_grad), expected, tolerance, strict=True
        ):
            error = ((got.double() - exact).abs().max() / exact.abs().max()).item()
            assert error <= allowed, f"{name} is off by {error}, allowed is {allowed}"


def dense_options(options: dict) -> dict:
    return {key: value for key, value in options.items() if key != "chunk_tokens"}


OPTIONS = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1, "chunk_tokens": 10},
    {"reduction": "none", "label_smoothing": 0.1, "chunk_tokens": 31},
]


@pytest.mark.parametrize("tensor_parallel", [2, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_fp64(tensor_parallel, options):
    expected = dense_answer(make_problem(), **dense_options(options))
    assert_equal(run_ranks(one_rank_of_the_loss, tensor_parallel, torch.float64, options), expected)


@pytest.mark.parametrize(
    ("tensor_parallel", "dtype", "options"),
    [
        (2, torch.float32, {"reduction": "mean", "label_smoothing": 0.1, "chunk_tokens": 31}),
        (4, torch.float32, {"reduction": "none", "label_smoothing": 0.1, "chunk_tokens": 31}),
        (2, torch.bfloat16, {"chunk_tokens": 31}),
        (2, torch.bfloat16, {"reduction": "none", "label_smoothing": 0.1, "chunk_tokens": 31}),
    ],
)
def test_error_within_that_of_the_plain_formula(tensor_parallel, dtype, options):
    """Error budget: of the paper's form on one process in the same precision, plus half, and 1 eps of float32."""
    problem = make_problem()
    exact = dense_answer(problem, **dense_options(options))
    rounded = dataclasses.replace(problem, hidden=problem.hidden.to(dtype), weight=problem.weight.to(dtype))
    plain = dense_answer(rounded, **dense_options(options))
    budget = [((x.double() - y).abs().max() / y.abs().max()).item() for x, y in zip(plain, exact, strict=True)]
    ranks = run_ranks(one_rank_of_the_loss, tensor_parallel, dtype, options)
    assert [x.dtype for x in ranks[0]] == [torch.float32, dtype, dtype]
    assert_equal(ranks, exact, [1.5 * error + torch.finfo(torch.float32).eps for error in budget])


@pytest.mark.parametrize("lay_out", [transposed, strided])
def test_inputs_that_are_not_contiguous(lay_out):
    options = {"reduction": "sum", "label_smoothing": 0.1, "chunk_tokens": 10}
    assert not lay_out(torch.zeros(4, 4)).is_contiguous()
    expected = dense_answer(make_problem(), **dense_options(options))
    assert_equal(run_ranks(one_rank_of_the_loss, 2, torch.float64, options, lay_out), expected)


def test_a_rank_that_only_pads():
    """A vocabulary of 100 over four ranks of 64 padded rows leaves two ranks without a real id."""
    results = run_ranks(rank_that_only_pads, 4)
    loss, hidden_grad, weight_grad = dense_answer(make_problem(vocab_size=100))
    assert_equal(results, (loss, hidden_grad, torch.cat([weight_grad, torch.zeros_like(weight_grad)])))


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


FIRST_IDS = torch.arange(0, 512, 128)  # of the shards of four ranks


def closed_problem():
    """All ids but the targets are rare and closed, ``FIRST_IDS`` among them."""
    problem = make_problem()
    target = torch.where(torch.isin(problem.target, FIRST_IDS), 3, problem.target)
    closed = torch.ones(len(problem.weight), dtype=torch.bool)
    closed[target[target >= 0]] = False
    gate = torch.where(closed, 0.0, 1.0)
    return dataclasses.replace(problem, target=target, gates=Gates(closed, gate, gate)), closed


def gradient_of_closed_rows(rank: int, world_size: int):
    problem, _ = closed_problem()
    shard = problem.shard(rank, world_size, dist.group.WORLD)
    weight, gates = problem.local(shard)
    hidden, weight = problem.hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    gated_linear_cross_entropy(hidden, weight, problem.target, gates, shard, chunk_tokens=31).backward()
    return weight.grad


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_a_closed_gate_leaves_nothing(tensor_parallel):
    """Exactly: an optimizer that only looks at signs would make a step of what is tiny."""
    problem, closed = closed_problem()
    weight_grad = torch.cat(run_ranks(gradient_of_closed_rows, tensor_parallel))
    assert closed[FIRST_IDS].all() and (weight_grad[closed] == 0).all()
    torch.testing.assert_close(weight_grad, dense_answer(problem)[2], rtol=0, atol=1e-12)


def one_rank_of_well_predicted(rank: int, world_size: int, dtype: torch.dtype, gated: bool, soft_cap: float):
    problem = rounded(well_predicted(make_problem(hidden_size=64)), dtype)
    shard = problem.shard(rank, world_size, dist.group.WORLD)
    weight, gates = problem.local(shard)
    hidden, weight = (x.to(dtype).requires_grad_() for x in (problem.hidden, weight))
    gated_linear_cross_entropy(
        hidden, weight, problem.target, gates if gated else None, shard, soft_cap=soft_cap
    ).backward()
    return hidden.grad, weight.grad


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
def test_targets_that_are_well_predicted(tensor_parallel, dtype, gated, soft_cap):
    """A P near 1 that is rounded to 16 bits leaves little of ``P - 1``, which is all there is to learn from.

    Error budget: 1.2 times that of torch's cross-entropy in float32 on logits in ``dtype``, as norms of matrices.
    """
    problem = rounded(well_predicted(make_problem(hidden_size=64)), dtype)
    _, *exact = dense(problem, gated, soft_cap=soft_cap)
    hidden, weight = (x.to(dtype).requires_grad_() for x in (problem.hidden, problem.weight))
    logits = (hidden @ weight[: problem.vocab_size].T).float()
    loss = F.cross_entropy(soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits, problem.target)
    loss.backward()
    assert 0.002 < loss < 0.03
    ranks = run_ranks(one_rank_of_well_predicted, tensor_parallel, dtype, gated, soft_cap)
    got = ranks[0][0], torch.cat([grad for _, grad in ranks])
    plain = dense(problem, gated=False, soft_cap=soft_cap)[1:]
    for name, one, truth, other, other_truth in zip(
        ("dH", "dW"), got, exact, (hidden.grad, weight.grad), plain, strict=True
    ):
        error, budget = ((x.double() - y).norm() / y.norm() for x, y in ((one, truth), (other, other_truth)))
        assert error <= 1.2 * budget, f"{name}: {error:.1e}, of torch's cross-entropy {budget:.1e}"
