"""What runs on a GPU, run here: Triton in its interpreter, and a loss that never waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from agg import AdaptiveGradientGating, frequency, gated_linear_cross_entropy, kernels, triton_kernels
from tests.agg.problems import dense_answer, make_problem, weigh

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "is_nonzero", "equal", "item")


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
    monkeypatch.setattr(kernels, "_triton_for", lambda tensor: triton_kernels)


def random_chunk(dtype: torch.dtype, columns: int = 517):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(9, columns, generator=generator)).to(dtype)
    return logits, torch.randint(columns, (9,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 517, 5000])
def test_triton_softmax_equals_torchs(with_triton, dtype, columns):
    """Error budget: twice that of torch's softmax in fp32, and the rounding to ``dtype``."""
    logits, target = random_chunk(dtype, columns)
    exact = logits.double()
    truth = exact.softmax(1)
    budget = (logits.float().softmax(1) / truth - 1).abs().max()
    p, log_norm, own = kernels.softmax_rows_(logits, target, torch.float32)
    assert p.data_ptr() == logits.data_ptr()
    held = truth > torch.finfo(dtype).tiny  # smaller ones lose bits in any case
    assert (p.double() / truth - 1).abs()[held].max() <= 2 * budget + torch.finfo(dtype).eps
    assert torch.allclose(log_norm.double(), exact.logsumexp(1), rtol=1e-6)
    assert torch.equal(own.double(), exact.gather(1, target[:, None])[:, 0])


@pytest.mark.parametrize("path", ["on_device", "with_triton"])
@pytest.mark.parametrize("count", [0, 4, 9])
def test_leading_rows_are_gated(request, path, count):
    request.getfixturevalue(path)
    p, _ = random_chunk(torch.float32)
    gate = torch.linspace(0, 2, 517)
    expected = torch.cat([p[:count] * gate, p[count:]])
    kernels.gate_leading_rows_(p, gate, torch.tensor(count))
    assert torch.equal(p, expected)


@pytest.mark.parametrize("path", ["on_device", "with_triton"])
@pytest.mark.parametrize("condition", [False, True])
def test_rows_are_scaled_if(request, path, condition):
    request.getfixturevalue(path)
    matrix, _ = random_chunk(torch.float32)
    factor = torch.linspace(0, 2, 9)
    expected = matrix * factor[:, None] if condition else matrix.clone()
    kernels.scale_rows_if_(matrix, factor, torch.tensor(condition))
    assert torch.equal(matrix, expected)


def answer(problem, dtype, **options):
    hidden = problem.hidden.to(dtype, copy=True).requires_grad_()
    weight = problem.weight.to(dtype, copy=True).requires_grad_()
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


def test_the_path_of_a_gpu_with_triton(with_triton):
    """Error budget: no further from fp64 than the same path of torch in fp32, plus 20 %."""
    problem = make_problem(ignored=0.3)
    with_triton_, exact = answer(problem, torch.float32), dense_answer(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_triton_for", lambda tensor: None)
        plain = answer(problem, torch.float32)
    for got, reference, truth in zip(with_triton_, plain, exact, strict=True):
        error, budget = ((x.double() - truth).abs().max() / truth.abs().max() for x in (got, reference))
        assert error <= 1.2 * budget + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("window", ["sliding", "exponential"])
def test_a_step_never_waits_for_the_device(on_device, monkeypatch, window):
    """Nor does the window: what it makes sparse lies in host memory by then."""
    problem = make_problem()
    module = AdaptiveGradientGating(
        problem.shard(0, 1), rare_fraction=0.3, window_steps=1, window=window, excluded_ids=(1,), label_smoothing=0.1
    )
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()

    def on_the_host(histogram):
        with _disable_current_modes():
            return sparse(histogram)

    sparse = frequency._sparse
    monkeypatch.setattr(frequency, "_sparse", on_the_host)
    with NoWait():
        for _ in range(3):
            module(hidden, weight, problem.target).backward()
    assert module.frequency.steps == 1 and module.current_gates().rare.any()
    with pytest.raises(AssertionError, match="waits"), NoWait():
        problem.target.nonzero()
