"""What runs on a GPU, run here: Triton in its interpreter, and a loss that never waits for the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from agg import (
    AdaptiveGradientGating,
    LossProbe,
    TokenFrequency,
    VocabShard,
    frequency,
    gated_linear_cross_entropy,
    kernels,
    step_counts,
    triton_kernels,
)
from tests.agg import on_device as device_checks
from tests.agg.problems import dense_answer, make_problem, transposed, weigh

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
    """Logits with a padded stride, Triton, and products summed in float32, as on a GPU."""
    addmm = torch.addmm

    def mixed_addmm(total, left, right, *, beta, out, out_dtype=None):
        if out_dtype is None:
            return addmm(total, left, right, beta=beta, out=out)
        # What torch asks for on a GPU, and what it does there.
        assert left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
        assert out is total and total.dtype == out_dtype == torch.float32
        return addmm(total, left.float(), right.float(), beta=beta, out=out)

    def padded(like, tokens, columns):
        return like.new_full((tokens, columns + 11), torch.nan)[:, :columns]

    monkeypatch.setattr(kernels, "_triton_for", lambda tensor: triton_kernels)
    monkeypatch.setattr(kernels, "_mixed_addmm_for", lambda tensor: True)
    monkeypatch.setattr(kernels, "logits_buffer", padded)
    monkeypatch.setattr(torch, "addmm", mixed_addmm)


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
    p, largest, total, own = kernels.softmax_rows_(logits, target, torch.float32)
    assert p.data_ptr() == logits.data_ptr()
    held = truth > torch.finfo(dtype).tiny  # smaller ones lose bits in any case
    assert (p.double() / truth - 1).abs()[held].max() <= 2 * budget + torch.finfo(dtype).eps
    assert torch.equal(largest.double(), exact.amax(1))
    assert torch.allclose(total.double(), (exact - exact.amax(1, keepdim=True)).exp().sum(1), rtol=1e-6)
    assert torch.equal(own.double(), exact.gather(1, target[:, None])[:, 0])


@pytest.mark.parametrize("columns", [517, 512])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_what_is_not_finite_stays_so(with_triton, columns, bad):
    logits, target = random_chunk(torch.float32, columns)
    logits[3, 100] = logits[5, columns - 1] = bad
    _, largest, total, _ = kernels.softmax_rows_(logits, target, torch.float32)
    assert torch.isfinite(largest + total.log()).tolist() == [row not in (3, 5) for row in range(9)]


@pytest.mark.parametrize("path", ["on_device", "with_triton"])
@pytest.mark.parametrize("count", [0, 4, 9])
def test_leading_rows_are_gated(request, path, count):
    request.getfixturevalue(path)
    p, _ = random_chunk(torch.float32)
    gate = torch.linspace(0, 2, 517)
    expected = torch.cat([p[:count] * gate, p[count:]])
    kernels.gate_leading_rows_(p, gate, torch.tensor(count))
    assert torch.equal(p, expected)


@pytest.mark.parametrize("path", [None, "on_device", "with_triton"])
@pytest.mark.parametrize("condition", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_rows_are_scaled_if(request, path, condition, few):
    """Few: less than an eighth of the rows."""
    if path is not None:
        request.getfixturevalue(path)
    matrix, _ = random_chunk(torch.float32)
    factor = torch.linspace(0, 2, 9)  # 1 in the middle: that row is left alone
    if few:
        factor = torch.where(torch.arange(9) == 2, 0.5, 1.0)
    expected = matrix * factor[:, None] if condition else matrix.clone()
    kernels.scale_rows_if_(matrix, factor, torch.tensor(condition))
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
        patch.setattr(kernels, "_triton_for", lambda tensor: None)
        patch.setattr(kernels, "values_are_at_hand", lambda tensor: True)
        plain, exact = answer(problem, dtype, **options), answer(problem, torch.float64, **options)
    for one, reference, truth in zip(got, plain, exact, strict=True):
        error, budget = ((x.double() - truth).abs().max() / truth.abs().max() for x in (one, reference))
        assert error <= 1.2 * budget + torch.finfo(dtype).eps


@pytest.mark.parametrize("kernel", ["gate_leading_rows_", "scale_rows_if_"])
def test_a_kernel_that_does_nothing_would_show(with_triton, monkeypatch, kernel):
    monkeypatch.setattr(triton_kernels, kernel, lambda *arguments: None)
    with pytest.raises(AssertionError):
        test_the_path_of_a_gpu_with_triton(None, torch.float32, torch.clone, {})
    monkeypatch.setattr(kernels, kernel, lambda *arguments: None)
    monkeypatch.setattr(kernels, "_triton_for", lambda tensor: None)
    with pytest.raises(AssertionError):
        test_the_path_of_a_gpu_equals_the_papers_formula(None, "mean", 0.3)


@pytest.mark.parametrize("place", [0, 1, 2, "p"])
def test_a_softmax_that_is_off_would_show(with_triton, monkeypatch, place):
    """By a hundredth of a per mille, in what it returns or in what it writes."""
    softmax_rows_ = triton_kernels.softmax_rows_

    def off(logits, target):
        returned = list(softmax_rows_(logits, target))
        (logits if place == "p" else returned[place]).mul_(1 + 1e-5)
        return tuple(returned)

    test_triton_softmax_equals_torchs(None, torch.float32, 517)
    monkeypatch.setattr(triton_kernels, "softmax_rows_", off)
    with pytest.raises(AssertionError):
        test_triton_softmax_equals_torchs(None, torch.float32, 517)


def test_products_of_bfloat16_are_summed_in_float32(with_triton, monkeypatch):
    """On a GPU and on the CPU alike; a sum in bfloat16 would lose all but the first of these."""
    left, right = torch.full((3, 1), 2**-9).bfloat16(), torch.ones(1, 2).bfloat16()
    for on_gpu in (True, False):
        monkeypatch.setattr(kernels, "_mixed_addmm_for", lambda tensor, on_gpu=on_gpu: on_gpu)
        total = torch.full((3, 2), torch.nan)
        kernels.add_product_(total, torch.ones(3, 1).bfloat16(), right, anew=True)
        for _ in range(4):
            kernels.add_product_(total, left, right, anew=False)
        assert torch.equal(total, torch.full((3, 2), 1 + 4 * 2**-9))


def test_entries_of_other_ranks_do_not_pile_up_on_one_row(monkeypatch):
    """Where rows are sorted, a row's entries are added one after the other."""
    rows, here = torch.randint(0, 10, (400,)), torch.rand(400) < 0.2
    rows[~here] = 0
    spread = kernels.spread_rows(rows, here, 10)
    assert torch.equal(spread[here], rows[here]) and spread[~here].bincount(minlength=10).max() < 60
    entries, sums = torch.rand(400, 3, dtype=torch.float64) * here[:, None], []
    for sorting in (True, False):
        monkeypatch.setattr(kernels, "_adds_by_sorting", lambda matrix, sorting=sorting: sorting)
        sums.append(torch.zeros(10, 3, dtype=torch.float64))
        kernels.add_rows_(sums[-1], rows, entries, here)
        kernels.add_rows_(torch.zeros(0, 3), rows[:0], entries[:0].float(), here[:0])
    torch.testing.assert_close(*sums, rtol=1e-14, atol=0)


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
