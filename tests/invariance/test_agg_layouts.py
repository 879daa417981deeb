"""One step on data-parallel x tensor-parallel ranks, in any micro-batches, equals the paper's answer."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import run_ranks
from tests.invariance.agg_layouts import (
    OPTIONS,
    errors,
    papers_answer,
    part_of_step,
    step_counts,
    step_gates,
    step_problem,
    wrong,
)

EVEN, UNEVEN = (1, 1, 1, 1), (5, 1, 2)  # micro-batches


def inside(gate: torch.Tensor) -> torch.Tensor:
    return (gate > 0) & (gate < 1)


def test_the_step_has_teeth():
    """Gates of rare targets are strictly inside and differ, so that it shows which was used and where it was not."""
    counts = step_counts()
    gates = step_gates(counts, OPTIONS)
    target = step_problem().target
    own = target[target >= 0]
    assert gates.rare[own].any() and not gates.rare[own].all()
    own = own[gates.rare[own]]
    assert (inside(gates.g1) & inside(gates.g2) & (gates.g1 != gates.g2))[own].sum() >= 8
    assert (gates.rare & (counts == 0)).any() and (gates.g2[gates.rare] == 1).any()
    assert all(counts[k] > 0 and not gates.rare[k] for k in OPTIONS["excluded_ids"])


@pytest.mark.parametrize("data_parallel", [1, 2, 4])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize(
    ("micro_batches", "dtype"),
    [((1,), torch.float64), (EVEN, torch.float64), (UNEVEN, torch.float64), ((1, 1), torch.float32)],
)
def test_a_step_on_every_layout(data_parallel, tensor_parallel, micro_batches, dtype):
    """Counts and gates exactly; fp64 to 1e-12.

    Error budget of fp32: that of the paper's form on one process, plus half, and 1 eps.
    """
    exact = papers_answer()
    tolerance = 1e-12
    if dtype == torch.float32:
        plain = errors(papers_answer(dtype=dtype), exact)
        tolerance = {name: 1.5 * error + torch.finfo(dtype).eps for name, error in plain.items()}
    layout = (data_parallel, tensor_parallel)
    parts = run_ranks(part_of_step, data_parallel * tensor_parallel, *layout, micro_batches, dtype)
    assert len(parts) == data_parallel * tensor_parallel
    assert wrong(parts, exact, tolerance) == set()
    assert all(torch.equal(part["loss"], parts[0][2]["loss"]) for *_, part in parts)


@pytest.mark.parametrize("layout", [(1, 2), (1, 4), (2, 2)])
def test_only_rare_tokens(layout):
    options = {"alpha": 1e9}
    exact = papers_answer(options)
    assert exact["rare"][:507].all()
    parts = run_ranks(part_of_step, layout[0] * layout[1], *layout, UNEVEN, torch.float64, options)
    assert wrong(parts, exact) == set()


@pytest.mark.parametrize("layout", [(1, 2), (1, 4), (2, 2)])
def test_no_rare_token(layout):
    """Ids that have not occurred are below any alpha, so they are excluded; the gradient is the plain one."""
    options = {"alpha": 1e-9, "excluded_ids": (step_counts()[:507] == 0).nonzero()[:, 0].tolist()}
    exact = papers_answer(options)
    assert not exact["rare"].any() and exact["g1"].eq(1).all() and exact["g2"].eq(1).all()
    parts = run_ranks(part_of_step, layout[0] * layout[1], *layout, UNEVEN, torch.float64, options)
    assert wrong(parts, exact) == set()
