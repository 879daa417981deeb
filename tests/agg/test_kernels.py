"""What runs on a GPU, run here: Triton in its interpreter, and a loss that never waits for the device."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from agg import (
    AdaptiveGradientGating,
    Gates,
    LossProbe,
    TokenFrequency,
    VocabShard,
    frequency,
    gated_linear_cross_entropy,
    kernels,
    projection,
    step_counts,
    triton_kernels,
)
from agg.job import Job
from agg.projection import Projection
from agg.triton_rows import _EQUAL as EQUAL
from tests.agg import on_device as device_checks
from tests.agg.problems import dense_answer, make_problem, transposed, weigh
from tests.distributed import run_ranks

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "is_nonzero", "equal", "item")
WAITS += ("isin", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive")


class NoWait(TorchDispatchMode):
    """Refuses what makes a GPU wait for the host or the host for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_", "index_put") else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        assert name not in WAITS and not by_mask, f"{function} waits"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def on_device(monkeypatch):
    """As if values were out of reach; with torch in the place of Triton."""
    monkeypatch.setattr(kernels, "values_are_at_hand", lambda tensor: False)


@pytest.fixture
def with_triton(on_device, monkeypatch):
    """Rows in pieces, Triton, and products summed in float32, as on a GPU."""
    addmm = torch.addmm

    def mixed_addmm(total, left, right, *, beta, out, out_dtype=None):
        if out_dtype is None:
            return addmm(total, left, right, beta=beta, out=out)
        # What torch asks for on a GPU, and what it does there.
        assert left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
        assert out is total and total.dtype == out_dtype == torch.float32
        return addmm(total, left.float(), right.float(), beta=beta, out=out)

    monkeypatch.setattr(kernels, "triton_for", lambda tensor: triton_kernels)
    monkeypatch.setattr(kernels, "mixed_addmm_for", lambda tensor: True)
    monkeypatch.setattr(projection, "wants_alignment", lambda tensor: True)
    monkeypatch.setattr(torch, "addmm", mixed_addmm)


def as_on_a_cpu(patch):
    patch.setattr(kernels, "triton_for", lambda tensor: None)
    patch.setattr(kernels, "values_are_at_hand", lambda tensor: True)
    patch.setattr(kernels, "mixed_addmm_for", lambda tensor: False)
    patch.setattr(projection, "wants_alignment", lambda tensor: False)


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


def answer(problem, dtype, laid_out=torch.clone, **options):
    hidden = laid_out(problem.hidden.to(dtype, copy=True)).requires_grad_()
    weight = laid_out(problem.weight.to(dtype, copy=True)).requires_grad_()
    loss = gated_linear_cross_entropy(
        hidden, weight, problem.target, problem.gates, problem.shard(0, 1), chunk_tokens=7, **options
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
    """Loss, dH and the rows of dW of this rank."""
    problem = make_problem(ignored=0.3)
    shard = VocabShard.of_rank(507, rank, world_size, dist.group.WORLD, multiple_of)
    rows, more = slice(shard.start, shard.stop), world_size * len(shard) - len(problem.weight)
    rare = F.pad(problem.gates.rare, (0, more))
    g1, g2 = (F.pad(gate, (0, more), value=1.0)[rows] for gate in (problem.gates.g1, problem.gates.g2))
    weight = F.pad(problem.weight, (0, 0, 0, more))[rows].float().requires_grad_()
    hidden, gates = problem.hidden.float().requires_grad_(), Gates(rare[rows], g1, g2, rare)
    loss = gated_linear_cross_entropy(hidden, weight, problem.target, gates, shard, chunk_tokens=7, **options)
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
        problem = make_problem(ignored=0.3)
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


@pytest.mark.parametrize("kernel", ["gate_at_turn_", "scale_at_turn_", "add_entries_"])
def test_a_kernel_that_does_nothing_would_show(with_triton, monkeypatch, kernel):
    monkeypatch.setattr(triton_kernels, kernel, lambda *arguments: None)
    with pytest.raises(AssertionError):
        test_the_path_of_a_gpu_with_triton(None, torch.float32, torch.clone, {})
    monkeypatch.setattr(kernels, kernel, lambda *arguments: arguments[1])
    monkeypatch.setattr(kernels, "triton_for", lambda tensor: None)
    with pytest.raises(AssertionError):
        test_the_path_of_a_gpu_equals_the_papers_formula(None, "mean", 0.3)


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


@pytest.mark.parametrize("window", ["sliding", "exponential"])
@pytest.mark.parametrize(
    ("reduction", "options"),
    [("mean", {"label_smoothing": 0.1}), ("sum", {"z_loss": 0.01, "soft_cap": 20.0}), ("none", {"z_loss": 0.01})],
)
@pytest.mark.parametrize("explicit", [True, False])
def test_a_step_never_waits_for_the_device(on_device, monkeypatch, window, reduction, options, explicit):
    """Nor does the window: what it makes sparse lies in host memory by then."""
    problem = make_problem()
    module = AdaptiveGradientGating(
        problem.shard(0, 1), rare_fraction=0.3, window_steps=1, window=window, excluded_ids=(1,), **options
    )
    probe = LossProbe()
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()

    hosted = []

    def on_the_host(function):
        def run(*args):
            hosted.append(function)
            with _disable_current_modes():
                try:
                    return function(*args)
                finally:
                    hosted.pop()

        return run

    def on_the_host_alone(name):
        original = getattr(torch.Tensor, name)

        def run(tensor, *args):
            assert hosted, f"{name} waits"
            return original(tensor, *args)

        return run

    for name in ("tolist", "numpy", "cpu"):  # what NoWait does not see
        monkeypatch.setattr(torch.Tensor, name, on_the_host_alone(name))

    monkeypatch.setattr(frequency, "_sparse", on_the_host(frequency._sparse))
    complaints = step_counts.StepCounts._raise_complaints
    monkeypatch.setattr(step_counts.StepCounts, "_raise_complaints", on_the_host(complaints))
    with NoWait():
        for _ in range(3):
            if explicit:
                module.begin_step(problem.target)
            weigh(module(hidden, weight, problem.target, reduction, probe)).backward()
    assert module.frequency.steps == 1 and module.current_gates().rare.any()
    with pytest.raises(AssertionError, match="waits"), NoWait():
        problem.target.nonzero()
    with pytest.raises(AssertionError, match="tolist waits"):
        problem.target.tolist()


def test_what_is_wrong_is_told_a_step_later(on_device):
    """Where looking at once would stall the device, and in words: an assertion there would end the process."""
    frequency = TokenFrequency(VocabShard(0, 512, 507), 3)
    frequency.update(torch.tensor([3, 507]))
    assert frequency.steps == 1
    with pytest.raises(ValueError, match="1 targets of this step are outside the vocabulary of 507 ids"):
        frequency.update(torch.tensor([3]))
    problem = make_problem()
    module = AdaptiveGradientGating(problem.shard(0, 1), alpha=0.3, window_steps=2)
    for hidden in (problem.hidden * torch.nan, problem.hidden):
        module(hidden, problem.weight, problem.target)
    with pytest.raises(FloatingPointError, match="not finite on 1 data-parallel ranks"):
        module(problem.hidden, problem.weight, problem.target)


@pytest.mark.parametrize("counted", [True, False])
def test_a_target_outside_the_vocabulary_is_told_of_by_the_module(on_device, counted):
    """Where it cannot be looked at it trains nothing, and a later step says so; also if it was not counted."""
    problem = make_problem()
    ignored, outside = problem.target.clone(), problem.target.clone()
    ignored[5], outside[5] = -100, 507
    answers = []
    for target in (ignored, outside):
        module = AdaptiveGradientGating(problem.shard(0, 1), alpha=0.3, window_steps=2)
        module.begin_step(outside if counted else ignored)
        weight = problem.weight.clone().requires_grad_()
        module(problem.hidden, weight, target).backward()
        answers.append(weight.grad)
    assert torch.equal(*answers) and answers[1].any()
    message = "1 targets of this step are outside" if counted else "on a GPU a target was outside the vocabulary"
    with pytest.raises(ValueError if counted else FloatingPointError, match=message):
        for _ in range(2):  # a fault is told with the counts of the step after
            module.begin_step(ignored)
            module.current_gates()
    with pytest.raises(RuntimeError, match="a target is outside the vocabulary of 507 ids"):
        module.eval()(problem.hidden, problem.weight, outside)


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


@pytest.mark.parametrize("check", device_checks.CHECKS)
def test_what_is_checked_on_a_gpu(check):
    """See there: with the CPU as the device, so that the checks themselves are known to run."""
    assert check("cpu")


def test_a_check_that_fails_hides_no_other(capsys, monkeypatch):
    def fails(device):
        raise RuntimeError("as it may be")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(device_checks, "CHECKS", (fails, lambda device: f"seen on {device}"))
    assert device_checks.main() == 1
    told = capsys.readouterr().out
    assert "fails: FAILED" in told and "RuntimeError: as it may be" in told and "seen on cuda" in told
