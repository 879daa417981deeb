"""The gated loss on one process, against the paper's formula and torch's cross-entropy."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from agg import Gates, VocabShard, gated_linear_cross_entropy, kernels
from agg.linear_cross_entropy import default_chunk_tokens
from tests.agg.problems import Problem, dense_answer, make_problem, weigh


def candidate(problem: Problem, gated: bool = True, dtype: torch.dtype = torch.float64, **options):
    shard = problem.shard(0, 1)
    hidden = problem.hidden.to(dtype, copy=True).requires_grad_()
    weight = problem.weight.to(dtype, copy=True).requires_grad_()
    loss = gated_linear_cross_entropy(
        hidden, weight, problem.target, problem.gates if gated else None, shard, **options
    )
    weigh(loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def assert_equal(got, expected, tolerance: float = 1e-12) -> None:
    for name, one, other in zip(("loss", "dH", "dW"), got, expected, strict=True):
        error = (one.double() - other).abs().max().item()
        assert error <= tolerance * max(1.0, other.abs().max().item()), f"{name} is off by {error}"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_equals_the_papers_formula(reduction, label_smoothing, gated, chunk_tokens):
    problem = make_problem()
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    assert_equal(
        candidate(problem, gated, chunk_tokens=chunk_tokens, **options), dense_answer(problem, gated, **options)
    )


def test_the_problem_has_teeth():
    """Gated and plain gradients differ, both classes of targets occur, and only dW is gated."""
    problem = make_problem()
    gated, plain = dense_answer(problem), dense_answer(problem, gated=False)
    rare_target = problem.gates.rare[problem.target[problem.target >= 0]]
    assert rare_target.any() and not rare_target.all()
    assert (gated[2] - plain[2]).abs().max() > 1e-3
    assert torch.allclose(gated[0], plain[0]) and torch.allclose(gated[1], plain[1])


def test_open_gates_equal_torch_cross_entropy():
    problem = make_problem()
    open_gates = Gates(problem.gates.rare, torch.ones(512), torch.ones(512))
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    loss = F.cross_entropy(hidden @ weight[:507].T, problem.target)
    loss.backward()
    assert_equal(candidate(dataclasses.replace(problem, gates=open_gates)), (loss.detach(), hidden.grad, weight.grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_error_within_that_of_the_plain_formula(dtype, gated):
    """Error budget: no further from fp64 than the paper's form computed in the same precision, plus 10 %."""
    problem = make_problem(tokens=256, hidden_size=64)
    truth = dense_answer(problem, gated)
    rounded = dataclasses.replace(problem, hidden=problem.hidden.to(dtype), weight=problem.weight.to(dtype))
    plain = dense_answer(rounded, gated)
    mine = candidate(problem, gated, dtype=dtype)
    unit = torch.finfo(dtype).eps
    for name, got, reference, exact in zip(("loss", "dH", "dW"), mine, plain, truth, strict=True):
        scale = exact.abs().max().item()
        error, budget = ((x.double() - exact).abs().max().item() / scale for x in (got, reference))
        assert error <= 1.1 * budget + unit, f"{name}: {error} against {budget} of the plain formula"


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    hidden_size=st.integers(1, 9),
    vocab_size=st.integers(1, 300),
    chunk_tokens=st.integers(1, 50),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    alpha=st.sampled_from([1e-9, 0.3, 1e9]),
    label_smoothing=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 10**6),
)
def test_any_shape(tokens, hidden_size, vocab_size, chunk_tokens, ignored, alpha, label_smoothing, seed):
    """Also nothing to learn from, no rare token, only rare tokens."""
    problem = make_problem(tokens, hidden_size, vocab_size=max(vocab_size, 2), alpha=alpha, ignored=ignored, seed=seed)
    options = {"reduction": "sum", "label_smoothing": label_smoothing}
    assert_equal(candidate(problem, chunk_tokens=chunk_tokens, **options), dense_answer(problem, **options))


def test_mean_over_no_valid_target_is_zero():
    problem = make_problem(ignored=1.1)
    loss, hidden_grad, weight_grad = candidate(problem)
    assert loss == 0 and not hidden_grad.any() and not weight_grad.any()


def test_ignored_positions_train_nothing():
    problem = make_problem(ignored=0.5)
    _, hidden_grad, _ = candidate(problem)
    assert not hidden_grad[problem.target == -100].any() and hidden_grad[problem.target != -100].any(1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"soft_cap": 20.0}])
@pytest.mark.parametrize("at_hand", [True, False])
def test_hidden_states_of_ignored_positions_may_hold_anything(monkeypatch, bad, options, at_hand):
    """As attention leaves NaN where all is masked; of torch's own loss dW is NaN then. Also on the path of a GPU."""
    monkeypatch.setattr(kernels, "values_are_at_hand", lambda tensor: at_hand)
    problem = make_problem(ignored=0.3)
    clean = candidate(problem, chunk_tokens=7, **options)
    problem.hidden[problem.target == -100] = bad
    assert_equal(candidate(problem, chunk_tokens=7, **options), clean, 0.0)


@pytest.mark.parametrize("ignore_index", [-1, 3, 510, 10**6])
@pytest.mark.parametrize("at_hand", [True, False])
def test_any_id_may_be_the_one_to_ignore(monkeypatch, ignore_index, at_hand):
    """Also the row of one that only pads, which has no logit; also on the path of a GPU."""
    monkeypatch.setattr(kernels, "values_are_at_hand", lambda tensor: at_hand)
    problem = make_problem()
    expected = dense_answer(dataclasses.replace(problem, target=problem.target.masked_fill(problem.target == 3, -100)))
    given = torch.where((problem.target == -100) | (problem.target == 3), ignore_index, problem.target)
    got = candidate(dataclasses.replace(problem, target=given), ignore_index=ignore_index)
    assert (given == ignore_index).sum() > (problem.target == -100).sum()
    assert_equal(got, expected)


def test_no_tokens():
    """As a micro-batch of which nothing is left."""
    problem = make_problem()
    empty = dataclasses.replace(problem, hidden=problem.hidden[:0], target=problem.target[:0])
    for reduction in ("mean", "sum", "none"):
        loss, hidden_grad, weight_grad = candidate(empty, reduction=reduction)
        assert loss.shape == ((0,) if reduction == "none" else ()) and not loss.any()
        assert hidden_grad.shape == (0, 16) and weight_grad.shape == (512, 16) and not weight_grad.any()


def test_padding_rows_take_no_part():
    problem = make_problem()
    problem.weight[507:] = 1e30
    loss, _, weight_grad = candidate(problem)
    assert torch.isfinite(loss) and not weight_grad[507:].any()


def test_non_contiguous_and_frozen_inputs():
    problem = make_problem()
    _, hidden_grad, weight_grad = dense_answer(problem)
    hidden = problem.hidden.T.contiguous().T.requires_grad_()
    gated_linear_cross_entropy(hidden, problem.weight, problem.target, problem.gates, problem.shard(0, 1)).backward()
    assert torch.allclose(hidden.grad, hidden_grad, rtol=0, atol=1e-13)
    weight = problem.weight.T.contiguous().T.requires_grad_()
    gated_linear_cross_entropy(problem.hidden, weight, problem.target, problem.gates, problem.shard(0, 1)).backward()
    assert torch.allclose(weight.grad, weight_grad, rtol=0, atol=1e-13)


def test_weight_tied_to_an_input_embedding():
    """Only the output side is gated: the input side adds its own, whole gradient."""
    problem = make_problem(ignored=0.0)
    inputs = problem.target.roll(1)
    results = []
    for gated in (True, False):
        weight = problem.weight.clone().requires_grad_()
        hidden = F.embedding(inputs, weight).tanh()
        own = problem.gates if gated else None
        gated_linear_cross_entropy(hidden, weight, problem.target, own, problem.shard(0, 1)).backward()
        with torch.no_grad():
            alone = weight.clone().requires_grad_()
        gated_linear_cross_entropy(hidden.detach(), alone, problem.target, own, problem.shard(0, 1)).backward()
        results.append((weight.grad - alone.grad, alone.grad))
    assert torch.allclose(results[0][0], results[1][0], rtol=0, atol=1e-13)
    assert not torch.allclose(results[0][1], results[1][1], atol=1e-4)


def test_backward_again_over_a_kept_graph():
    problem = make_problem()
    shard = problem.shard(0, 1)
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    loss = gated_linear_cross_entropy(hidden, weight, problem.target, problem.gates, shard)
    first = torch.autograd.grad(2 * loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    assert_equal((loss.detach() * 2, *first), [2 * part for part in dense_answer(problem)])
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(2 * loss, hidden)


@pytest.mark.parametrize("reduction", ["mean", "sum"])  # with none it is formed in backward in any case
def test_no_gradient_is_formed_where_none_is_wanted(monkeypatch, reduction):
    """Also under no_grad with a parameter, as in evaluation: it would cost a V x D sum."""
    problem = make_problem()
    weight = torch.nn.Parameter(problem.weight.clone())
    monkeypatch.setattr(kernels, "add_product_", lambda *_, **__: pytest.fail("dW is formed"))
    with torch.no_grad():
        gated_linear_cross_entropy(
            problem.hidden, weight, problem.target, problem.gates, problem.shard(0, 1), reduction=reduction
        )


def test_float16_under_a_loss_scaler():
    """Error budget: that of torch's own cross-entropy in float16, plus 10 %: nothing underflows before the scale."""
    problem = make_problem(tokens=2048, hidden_size=32, ignored=0.0)
    problem.weight.mul_(0.02)  # as weights are; a mean over 2,048 tokens then lies among float16's subnormal numbers
    truth = dense_answer(problem, gated=False)
    answers = []
    for mine in (True, False):
        hidden, weight = problem.hidden.half().requires_grad_(), problem.weight.half().requires_grad_()
        if mine:
            loss = gated_linear_cross_entropy(hidden, weight, problem.target, None, problem.shard(0, 1))
        else:
            loss = F.cross_entropy((hidden @ weight[:507].T).float(), problem.target)
        (2.0**14 * loss).backward()
        answers.append((hidden.grad.double() / 2**14, weight.grad.double() / 2**14))
    for got, reference, exact in zip(*answers, truth[1:], strict=True):
        error, budget = ((x - exact).abs().max() / exact.abs().max() for x in (got, reference))
        assert error <= 1.1 * budget


@pytest.mark.parametrize(
    ("device", "rows", "limit"),
    [
        ("cpu", 100, 41_943),  # in the cache
        ("cpu", 8_192, 512),
        ("cpu", 8_193, 1_024),  # not in it with 512 tokens
        ("cpu", 131_072, 1_024),
        ("cuda", 16_384, 16_384),
        ("cuda", 50_257, 5_341),
        ("cuda", 131_072, 4_096),
        ("cuda", 262_144, 2_048),
        ("cuda", 2**22, 256),
    ],
)
def test_chunks_are_as_long_as_each_other(device, rows, limit):
    for tokens in (7, 1_000, 4_096, 8_192, 100_000):
        chunk = default_chunk_tokens(rows, tokens, device)
        assert chunk <= min(tokens, limit + 31) and -(-tokens // chunk) <= -(-tokens // limit)
    assert default_chunk_tokens(rows, 0, device) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_differentiating_twice_is_refused(reduction):
    problem = make_problem()
    hidden = problem.hidden.clone().requires_grad_()
    loss = gated_linear_cross_entropy(
        hidden, problem.weight, problem.target, problem.gates, problem.shard(0, 1), reduction=reduction
    )
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(loss.sum(), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(96, 3).double()}, ValueError, "hidden must be"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, "target must be \\[T\\]"),
        ({"target": torch.zeros(96, dtype=torch.int32)}, ValueError, "int64"),
        ({"target": torch.full((96,), 507)}, IndexError, "507 is outside the vocabulary"),
        ({"target": torch.full((96,), -1)}, IndexError, "-1 is outside"),
        ({"hidden": torch.zeros(96, 16)}, ValueError, "one floating dtype"),
        ({"shard": VocabShard(0, 256, 507)}, ValueError, "512 rows"),
        ({"gates": Gates(torch.zeros(3), torch.zeros(3), torch.zeros(3))}, ValueError, "gates.rare has 3 rows"),
        ({"gates": Gates(*torch.zeros(3, 512))}, ValueError, "must be bool"),
        ({"gates": Gates(torch.ones(512).bool(), *torch.zeros(3, 512))}, ValueError, "must be bool"),
        ({"gates": Gates(torch.ones(512).bool(), *torch.zeros(2, 512), torch.zeros(9))}, ValueError, "has 9 ids"),
        ({"reduction": "average"}, ValueError, "reduction is 'average'"),
        ({"label_smoothing": 1.0}, ValueError, "label_smoothing is 1.0"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens is 0"),
    ],
)
def test_bad_input(change, error, message):
    problem = make_problem()
    arguments = {
        "hidden": problem.hidden,
        "weight": problem.weight,
        "target": problem.target,
        "gates": problem.gates,
        "shard": problem.shard(0, 1),
    }
    with pytest.raises(error, match=message):
        gated_linear_cross_entropy(**(arguments | change))
