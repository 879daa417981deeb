"""Sums over chunks of bf16 inputs are held in float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.agg.problems import dense_answer, make_problem
from tests.agg.test_linear_cross_entropy import candidate


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_error_does_not_grow_with_the_number_of_chunks(reduction, gated):
    """Error budget: in 64 chunks 1.2 times that of the same call in one chunk, and 1 eps of float32.

    Both against fp64 on the same rounded inputs. A sum in bf16 would lose up to 1 / 512 of itself at each chunk.
    """
    problem = make_problem(tokens=2048, hidden_size=8, vocab_size=60, alpha=1.0)
    inputs = {name: getattr(problem, name).bfloat16().double() for name in ("hidden", "weight")}
    problem = dataclasses.replace(problem, **inputs)
    exact = dense_answer(problem, gated, reduction=reduction)
    one, many = (
        candidate(problem, gated, torch.bfloat16, reduction=reduction, chunk_tokens=chunk) for chunk in (2048, 32)
    )
    for name, got, reference, truth in zip(("loss", "dH", "dW"), many, one, exact, strict=True):
        error, budget = ((x.double() - truth).abs().max() / truth.abs().max() for x in (got, reference))
        assert error <= 1.2 * budget + torch.finfo(torch.float32).eps, f"{name}: {error}, in one chunk {budget}"
