"""Whole loss calls as a GPU makes them, against the same on a CPU and the paper's formula."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from agg import (
    Gates,
    VocabShard,
    gated_linear_cross_entropy,
    kernels,
    projection,
    triton_kernels,
)
from tests.agg.problems import dense_answer, make_problem, transposed, weigh
from tests.distributed import run_ranks


def as_on_a_cpu(patch):
    patch.setattr(kernels, "triton_for", lambda tensor: None)
    patch.setattr(kernels, "values_are_at_hand", lambda tensor: True)
    patch.setattr(kernels, "mixed_addmm_for", lambda tensor: False)
    patch.setattr(projection, "wants_alignment", lambda tensor: False)


def answer(problem, dtype, laid_out=torch.clone, **options):
    hidden = laid_out(problem.hidden.to(dtype, copy=True)).requires_grad_()
    weight = laid_out(problem.weight.to(dtype, copy=True)).requires_grad_()
    loss = gated_linear_cross_entropy(
        hidden, weight, problem.target, problem.gates, problem.shard(0, 1), chunk_tokens=20, **options
    )
    weigh(loss).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha", [1e-9, 0.3, 1e9])
def test_the_path_of_a_gpu_equals_the_papers_formula(on_device, reduction, alpha):
    """Ignored positions stay in the chunks, and only the device knows in which of them the rare ones end."""
    problem = make_problem(alpha=alpha, ignored=0.3)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    for got, expected in zip(answer(problem, torch.float64, **options), dense_answer(problem, **options), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "laid_out", "options"),
    [
        (torch.float32, torch.clone, {}),
        (torch.float32, transposed, {"label_smoothing": 0.1, "reduction": "none"}),
        (torch.float32, transposed, {"soft_cap": 20.0}),
        (torch.bfloat16, torch.clone, {"label_smoothing": 0.1, "reduction": "none"}),
        (torch.bfloat16, transposed, {"z_loss": 0.03, "reduction": "sum"}),
    ],
)
def test_the_path_of_a_gpu_with_triton(with_triton, dtype, laid_out, options):
    """Error budget: no further from the path of the CPU in fp64 than that path in ``dtype``, plus 20 %."""
    problem = make_problem(ignored=0.3)
    got = answer(problem, dtype, laid_out, **options)
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_cpu(patch)
        plain, exact = answer(problem, dtype, **options), answer(problem, torch.float64, **options)
    for one, reference, truth in zip(got, plain, exact, strict=True):
        error, budget = ((x.double() - truth).abs().max() / truth.abs().max() for x in (one, reference))
        assert error <= 1.2 * budget + torch.finfo(dtype).eps


def split_answer(rank: int, world_size: int, options: dict, multiple_of: int):
    """Loss, dH and the rows of dW of this rank. The rare end in the second of three chunks."""
    problem = make_problem(tokens=48, ignored=0.3)
    shard = VocabShard.of_rank(507, rank, world_size, dist.group.WORLD, multiple_of)
    rows, more = slice(shard.start, shard.stop), world_size * len(shard) - len(problem.weight)
    rare = F.pad(problem.gates.rare, (0, more))
    g1, g2 = (F.pad(gate, (0, more), value=1.0)[rows] for gate in (problem.gates.g1, problem.gates.g2))
    weight = F.pad(problem.weight, (0, 0, 0, more))[rows].float().requires_grad_()
    hidden, gates = problem.hidden.float().requires_grad_(), Gates(rare[rows], g1, g2, rare)
    loss = gated_linear_cross_entropy(hidden, weight, problem.target, gates, shard, chunk_tokens=16, **options)
    weigh(loss).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(("tensor_parallel", "multiple_of"), [(1, 128), (2, 128), (4, 128), (4, 1024)])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.03, "reduction": "none"}, {"label_smoothing": 0.1}])
def test_the_path_of_a_gpu_on_tensor_parallel_ranks(with_triton, tensor_parallel, multiple_of, options):
    """In the last layout two ranks hold nothing but padding."""
    parts = run_ranks(split_answer, tensor_parallel, options, multiple_of)
    whole = (parts[0][0], parts[0][1], torch.cat([grad for *_, grad in parts])[:512])
    assert all(torch.equal(part[0], whole[0]) for part in parts)
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_cpu(patch)
        problem = make_problem(tokens=48, ignored=0.3)
        plain, exact = answer(problem, torch.float32, **options), answer(problem, torch.float64, **options)
    assert_within(whole, plain, exact)


def assert_within(got, plain, exact) -> None:
    """Twice the error of ``plain`` and 1 eps of float32, as shares of the largest entry."""
    for one, reference, truth in zip(got, plain, exact, strict=True):
        assert one.shape == truth.shape
        if truth.numel():
            error, budget = ((x.double() - truth).abs().max() for x in (one, reference))
            assert error <= 2 * budget + torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("edge", ["no tokens", "all ignored", "an id is ignored", "strided"])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1, "reduction": "sum"}])
def test_edges_of_the_path_of_a_gpu(with_triton, edge, options):
    """What ignored positions hold is NaN."""
    problem = make_problem(tokens=0 if edge == "no tokens" else 96, ignored=1.0 if edge == "all ignored" else 0.3)
    if edge == "an id is ignored":
        problem.target[problem.target == -100] = 3
        options = {**options, "ignore_index": 3}
    wide = torch.stack([problem.gates.rare, ~problem.gates.rare], 1)
    gates = dataclasses.replace(problem.gates, rare_ids=wide[:, 0] if edge == "strided" else problem.gates.rare)
    problem = dataclasses.replace(problem, gates=gates)
    masked = dataclasses.replace(problem, hidden=problem.hidden.clone())
    masked.hidden[problem.target == options.get("ignore_index", -100)] = torch.nan
    got = answer(masked, torch.float32, **options)
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_cpu(patch)
        plain, exact = answer(problem, torch.float32, **options), answer(problem, torch.float64, **options)
    assert_within(got, plain, exact)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_on_the_path_of_a_gpu(with_triton, reduction):
    problem = make_problem()
    hidden, weight = problem.hidden.float().requires_grad_(), problem.weight.float().requires_grad_()
    given = (hidden, weight, problem.target, problem.gates, problem.shard(0, 1))
    loss = weigh(gated_linear_cross_entropy(*given, reduction=reduction))
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(one, other) and one.any() for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("kernel", ["gate_at_turn_", "scale_at_turn_", "add_entries_"])
def test_a_kernel_that_does_nothing_would_show(with_triton, monkeypatch, kernel):
    monkeypatch.setattr(triton_kernels, kernel, lambda *arguments: None)
    with pytest.raises(AssertionError):
        test_the_path_of_a_gpu_with_triton(None, torch.float32, torch.clone, {})
    with pytest.raises(AssertionError):
        test_the_path_of_a_gpu_on_tensor_parallel_ranks(None, 2, 128, {})
    monkeypatch.setattr(kernels, kernel, lambda *arguments: arguments[1])
    monkeypatch.setattr(kernels, "triton_for", lambda tensor: None)
    with pytest.raises(AssertionError):
        test_the_path_of_a_gpu_equals_the_papers_formula(None, "mean", 0.3)
