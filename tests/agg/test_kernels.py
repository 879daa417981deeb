"""The kernels of a loss call by themselves: Triton in its interpreter against torch, and what it compiles to."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from agg import (
    VocabShard,
    gated_linear_cross_entropy,
    kernels,
    projection,
    triton_kernels,
)
from agg.job import Job
from agg.projection import Projection
from agg.triton_rows import _EQUAL as EQUAL
from tests.agg.problems import make_problem


def random_chunk(dtype: torch.dtype, columns: int = 517):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(9, columns, generator=generator)).to(dtype)
    return logits, torch.randint(columns, (9,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 512, 517, 70_000])  # whole blocks, with a rest, and several
def test_triton_softmax_equals_torchs(with_triton, dtype, columns):
    """Error budget: twice that of torch's softmax in fp32, and the rounding to ``dtype``."""
    logits, target = random_chunk(dtype, columns)
    exact = logits.double()
    truth = exact.softmax(1)
    budget = (logits.float().softmax(1) / truth - 1).abs().max()
    here = torch.arange(9) != 4
    p, (largest, total, own) = kernels.softmax_rows_(logits, target, here, torch.float32)
    assert p.data_ptr() == logits.data_ptr()
    held = truth > torch.finfo(dtype).tiny  # smaller ones lose bits in any case
    at_target = here[:, None] & (torch.arange(columns) == target[:, None])
    assert p[at_target].eq(0).all()
    held &= ~at_target
    assert (p.double() / truth - 1).abs()[held].max() <= 2 * budget + torch.finfo(dtype).eps
    assert torch.equal(largest.double(), exact.amax(1))
    assert torch.allclose(total.double(), (exact - exact.amax(1, keepdim=True)).exp().sum(1), rtol=1e-6)
    assert torch.equal(own.double(), exact.gather(1, target[:, None])[:, 0] * here)


@pytest.mark.parametrize("columns", [517, 512])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_what_is_not_finite_stays_so(with_triton, columns, bad):
    logits, target = random_chunk(torch.float32, columns)
    logits[3, 100] = logits[5, columns - 1] = bad
    _, (largest, total, _) = kernels.softmax_rows_(logits, target, target >= 0, torch.float32)
    assert torch.isfinite(largest + total.log()).tolist() == [row not in (3, 5) for row in range(9)]


@pytest.mark.parametrize("path", [None, "on_device", "with_triton"])
@pytest.mark.parametrize(("rare_count", "leading"), [(0, 0), (20, 0), (24, 4), (29, 9), (30, 0)])
def test_rows_are_gated_at_the_turn(request, path, rare_count, leading):
    """In a chunk of the positions 20 to 28, where the rare ones end before it, in it, or after it."""
    if path is not None:
        request.getfixturevalue(path)
    p, _ = random_chunk(torch.float32)
    gate = torch.linspace(0, 2, 517)
    expected = torch.cat([p[:leading] * gate, p[leading:]])
    kernels.gate_at_turn_(p, gate, torch.tensor(rare_count), 20)
    assert torch.equal(p, expected)


@pytest.mark.parametrize("path", [None, "on_device", "with_triton"])
@pytest.mark.parametrize(("rare_count", "condition"), [(20, False), (21, True), (29, True), (30, False)])
@pytest.mark.parametrize("few", [False, True])
def test_rows_are_scaled_at_the_turn(request, path, rare_count, condition, few):
    """Few: less than an eighth of the rows."""
    if path is not None:
        request.getfixturevalue(path)
    matrix, _ = random_chunk(torch.float32)
    factor = torch.linspace(0, 2, 9)  # 1 in the middle: that row is left alone
    if few:
        factor = torch.where(torch.arange(9) == 2, 0.5, 1.0)
    expected = matrix * factor[:, None] if condition else matrix.clone()
    kernels.scale_at_turn_(matrix, factor, torch.tensor(rare_count), 20, 9)
    assert torch.equal(matrix, expected)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["both", "all rare", "none rare", "all ignored", "one"])
def test_triton_puts_positions_in_the_same_order(with_triton, gated, rank, kind):
    problem = make_problem(tokens=1 if kind == "one" else 700, ignored=1.0 if kind == "all ignored" else 0.3)
    rare = problem.gates.rare
    rare = {"all rare": torch.ones_like(rare), "none rare": torch.zeros_like(rare)}.get(kind, rare)
    gates = dataclasses.replace(problem.gates, rare_ids=rare) if gated else None
    shard = VocabShard(256 * rank, 256 * (rank + 1), 507)  # of two, whose group takes no part
    mine = Job(problem.target, gates, shard, -100, 0.0, 7).positions()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "triton_for", lambda tensor: None)
        theirs = Job(problem.target, gates, shard, -100, 0.0, 7).positions()
    for field in dataclasses.fields(mine):
        one, other = getattr(mine, field.name), getattr(theirs, field.name)
        assert one.dtype == other.dtype and torch.equal(one, other), field.name


@pytest.mark.parametrize("outside", [507, -1])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("path", ["on_device", "with_triton"])
def test_a_target_outside_the_vocabulary_is_asserted(request, outside, gated, path):
    request.getfixturevalue(path)
    problem = make_problem(tokens=700)
    problem.target[300] = outside
    gates = problem.gates if gated else None
    with pytest.raises(RuntimeError, match="a target is outside the vocabulary of 507 ids"):
        gated_linear_cross_entropy(problem.hidden, problem.weight, problem.target, gates, problem.shard(0, 1))


@pytest.mark.parametrize("repeated", [1, EQUAL - 1, EQUAL, EQUAL + 1, 2 * EQUAL + 1])
@pytest.mark.parametrize("gated", [True, False])
def test_entries_of_one_target_are_added_together(with_triton, repeated, gated):
    """Also if one turn of the kernel does not take them all. Error budget: twice that of torch in float32."""
    target = torch.cat([torch.tensor([3, 3, 300, 250, 300, -100]), torch.full((repeated,), 9), torch.tensor([255, 0])])
    positions = Job(target, None, VocabShard(0, 256, 507), -100, 0.0, 7).positions()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(target), 600, generator=generator)  # more columns than a program takes
    coefficient = torch.randn(len(target), generator=generator) * positions.here
    after = torch.rand(256, generator=generator) if gated else None
    answers = []
    for path, dtype in ((triton_kernels, torch.float32), (None, torch.float32), (None, torch.float64)):
        matrix = torch.ones(256, 600, dtype=dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "triton_for", lambda tensor, path=path: path)
            own = after if after is None else after.to(dtype, copy=True)
            factor = kernels.add_entries_(matrix, own, hidden.to(dtype), positions, coefficient.to(dtype), 7)
        answers.append((matrix, factor))
    (mine, factor), (plain, _), (exact, exact_factor) = answers
    error, budget = ((x.double() - exact).abs().max() for x in (mine, plain))
    assert error <= 2 * budget
    assert factor is exact_factor if after is None else torch.equal(factor.double(), exact_factor)
    assert (mine != 1).any(1).nonzero()[:, 0].tolist() == [0, 3, 9, 250, 255]


@pytest.mark.parametrize("rows", [40, 64, 100, 507])
@pytest.mark.parametrize("aligned", [True, False])
def test_rows_in_pieces_are_multiplied_the_same(monkeypatch, rows, aligned):
    """Whatever stood in the memory before."""
    monkeypatch.setattr(projection, "wants_alignment", lambda tensor: aligned)
    monkeypatch.setattr(kernels, "mixed_addmm_for", lambda tensor: aligned)
    hidden, weight = torch.randn(9, 8, dtype=torch.float64), torch.randn(rows, 8, dtype=torch.float64)
    pieces = Projection(weight, 12)
    pieces._buffer.fill_(torch.nan)
    logits = pieces.logits(hidden)
    assert pieces._buffer.stride(0) == (-(-rows // 64) * 64 if aligned else rows)
    torch.testing.assert_close(logits, hidden @ weight.T)
    p = pieces.put(logits.softmax(1))
    assert p.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(pieces.times_weight(9, torch.float64), p @ weight)
    total = torch.full((rows, 8), torch.nan, dtype=torch.float64)
    for _ in range(2):
        pieces.add_transposed_(total, hidden, anew=bool(total.isnan().any()))
    torch.testing.assert_close(total, 2 * p.T @ hidden)


@pytest.mark.parametrize("place", [0, 1, 2, "p"])
def test_a_softmax_that_is_off_would_show(with_triton, monkeypatch, place):
    """By a hundredth of a per mille, in what it returns or in what it writes."""
    softmax_rows_ = triton_kernels.softmax_rows_

    def off(logits, target, here):
        returned = softmax_rows_(logits, target, here)
        (logits if place == "p" else returned[place]).mul_(1 + 1e-5)
        return returned

    test_triton_softmax_equals_torchs(None, torch.float32, 517)
    monkeypatch.setattr(triton_kernels, "softmax_rows_", off)
    with pytest.raises(AssertionError):
        test_triton_softmax_equals_torchs(None, torch.float32, 517)


def test_products_of_bfloat16_are_summed_in_float32(with_triton, monkeypatch):
    """On a GPU and on the CPU alike; a sum in bfloat16 would lose all but the first of these."""
    left, right = torch.full((3, 1), 2**-9).bfloat16(), torch.ones(1, 2).bfloat16()
    for on_gpu in (True, False):
        monkeypatch.setattr(kernels, "mixed_addmm_for", lambda tensor, on_gpu=on_gpu: on_gpu)
        total = torch.full((3, 2), torch.nan)
        kernels.add_product_(total, torch.ones(3, 1).bfloat16(), right, anew=True)
        for _ in range(4):
            kernels.add_product_(total, left, right, anew=False)
        assert torch.equal(total, torch.full((3, 2), 1 + 4 * 2**-9))


def test_the_kernels_compile_for_an_h100(tmp_path):
    """No register is spilled, and whole blocks move 16 bytes at a time; a mask or an odd stride would undo that."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.agg.compiled_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    made = json.loads(done.stdout)
    assert {name: kernel["spilled"] for name, kernel in made.items()} == dict.fromkeys(made, 0)
    for name in ("softmax", "softmax of 50,257 columns"):  # 32 columns of 2 bytes for each of 1,024 threads, twice
        assert made[name]["memory"]["ld.global.v4.b32"] == 8 and made[name]["memory"]["st.global.v4.b32"] == 4
    for name in ("gate", "gate of 50,257 columns"):  # as many of P, and twice as many bytes of the gate
        memory = made[name]["memory"]
        assert memory["ld.global.v4.b32"] >= 12 and memory["st.global.v4.b32"] >= 4
