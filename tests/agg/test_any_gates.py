"""Property test: whatever the gates, also those that no counts give, the gradient is that of the paper's formula."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agg import Gates
from tests.agg.problems import Problem, dense_answer, make_problem
from tests.agg.test_linear_cross_entropy import assert_equal, candidate

# Ends, a gate that float32 barely holds, one below what row_factors divides by, and ordinary ones.
VALUES = torch.tensor([0.0, 1.0, 1e-38, 2.0**-70, 1e-3, 0.25, 0.9])


def with_gates(problem: Problem, rare_share: float, seed: int) -> Problem:
    """Any rare mask; g1 and g2 drawn apart, of the ids that are not rare as well."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(problem.gates.rare)
    g1, g2 = (VALUES[torch.randint(len(VALUES), (rows,), generator=generator)] for _ in range(2))
    rare = torch.rand(rows, generator=generator) < rare_share
    return dataclasses.replace(problem, gates=Gates(rare, g1, g2))


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocab_size=st.integers(2, 60),
    rare_share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    label_smoothing=st.sampled_from([0.0, 0.3]),
    chunk_tokens=st.integers(1, 50),
    ignored=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 10**6),
)
@example(40, 60, 0.5, "none", 0.3, 7, 0.5, 0)  # both classes, the turn inside a chunk, all values of both gates
def test_any_gates(tokens, vocab_size, rare_share, reduction, label_smoothing, chunk_tokens, ignored, seed):
    problem = with_gates(make_problem(tokens, 5, vocab_size, ignored=ignored, seed=seed), rare_share, seed)
    if reduction == "mean" and not (problem.target >= 0).any():
        return  # torch's mean over nothing is NaN
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    assert_equal(candidate(problem, chunk_tokens=chunk_tokens, **options), dense_answer(problem, **options))


def test_all_values_of_both_gates():
    """The example above by itself, with the pairs that row_factors tells apart."""
    problem = with_gates(make_problem(40, 5, 60, ignored=0.5, seed=0), 0.5, 0)
    gates, target = problem.gates, problem.target[problem.target >= 0]
    assert gates.rare[target].any() and not gates.rare[target].all()
    assert ((gates.g1 == 0) & (gates.g2 > 0.1)).any()
    assert ((gates.g1 > 0) & (gates.g1 < 2.0**-60) & (gates.g2 == 1)).any()
    options = {"reduction": "none", "label_smoothing": 0.3}
    assert_equal(candidate(problem, chunk_tokens=7, **options), dense_answer(problem, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_gates_in_other_dtypes(dtype):
    """Error budget: no further from fp64 than the paper's form computed in the same precision, plus 10 %, and 1 eps."""
    problem = with_gates(make_problem(256, 64), 0.5, 1)
    exact = dense_answer(problem)
    rounded = dataclasses.replace(problem, hidden=problem.hidden.to(dtype), weight=problem.weight.to(dtype))
    answers = zip(("loss", "dH", "dW"), candidate(problem, dtype=dtype), dense_answer(rounded), exact, strict=True)
    for name, got, reference, truth in answers:
        error, budget = ((x.double() - truth).abs().max() / truth.abs().max() for x in (got, reference))
        assert error <= 1.1 * budget + torch.finfo(dtype).eps, f"{name}: {error} against {budget} of the plain formula"


def test_far_apart_gates_in_float16():
    """Long windows make g1 a millionth of g2: P over g1 may not overflow in the sum over 2,048 tokens.

    Error budget: that of the loss without gates in float16, plus 10 %, and 1 eps.
    """
    problem = make_problem(2048, 64)
    gates = dataclasses.replace(problem.gates, g1=torch.where(problem.gates.rare, 1e-6 * problem.gates.g1, 1.0))
    problem = dataclasses.replace(problem, gates=gates)
    dtype, answers = torch.float16, []
    for gated in (True, False):
        got, exact = (
            candidate(problem, gated, dtype, reduction="sum")[2],
            dense_answer(problem, gated, reduction="sum")[2],
        )
        answers.append(((got.double() - exact).abs().max() / exact.abs().max()).item())
    assert answers[0] <= 1.1 * answers[1] + torch.finfo(dtype).eps
