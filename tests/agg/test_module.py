"""The one-call object against its parts."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from agg import AdaptiveGradientGating, Gates, LossProbe, TokenFrequency, gated_linear_cross_entropy, rarity_gates
from tests.agg.problems import make_problem


def build(problem, **options):
    return AdaptiveGradientGating(
        problem.shard(0, 1), **({"alpha": 0.3, "window_steps": 4, "reference_batch_tokens": 64} | options)
    )


def test_counts_then_gates_then_loss():
    problem = make_problem()
    shard, module = problem.shard(0, 1), build(problem, excluded_ids=(1,))
    frequency = TokenFrequency(shard, 4)
    frequency.update(problem.target)
    gates = rarity_gates(
        frequency.appearances,
        tokens=frequency.tokens,
        alpha=0.3,
        reference_batch_tokens=64,
        shard=shard,
        excluded_ids=(1,),
    )
    grads = []
    for loss_of in (module, lambda h, w, t: gated_linear_cross_entropy(h, w, t, gates, shard)):
        weight = problem.weight.clone().requires_grad_()
        loss_of(problem.hidden, weight, problem.target).backward()
        grads.append(weight.grad)
    assert torch.equal(*grads)


def test_rare_fraction_and_a_fading_window():
    problem = make_problem(ignored=0.0)
    module = build(problem, alpha=None, rare_fraction=0.5, window="exponential", window_steps=2)
    for _ in range(3):
        module(problem.hidden, problem.weight, problem.target)
    assert module.frequency.tokens == 96 * 1.75
    rare, counts = module.current_gates().rare[:507], module.frequency.appearances[:507]
    assert rare[counts == 0].all() and not rare[counts == counts.max()].any()


def test_micro_batches_equal_the_whole_batch():
    problem = make_problem(ignored=0.0)
    grads = []
    for parts in (1, 4):
        module, weight = build(problem), problem.weight.clone().requires_grad_()
        module.begin_step(problem.target)
        for hidden, target in zip(problem.hidden.chunk(parts), problem.target.chunk(parts), strict=True):
            module(hidden, weight, target, reduction="sum").backward()
        grads.append(weight.grad)
        assert module.frequency.steps == 1
    assert torch.allclose(*grads, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(targets=st.lists(st.integers(-1, 506), min_size=1, max_size=40), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_any_split_into_micro_batches(targets, cuts):
    """Any targets (-1: ignored) cut anywhere, also into parts of which nothing is left."""
    problem = make_problem(tokens=len(targets))
    target = torch.tensor(targets)
    sizes = torch.tensor([0, *sorted(min(cut, len(targets)) for cut in cuts), len(targets)]).diff().tolist()
    answers = []
    for split in ([len(targets)], sizes):
        module = build(problem, ignore_index=-1)
        hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
        module.begin_step(target)
        losses = [
            module(part, weight, its_target, reduction="sum")
            for part, its_target in zip(hidden.split(split), target.split(split), strict=True)
        ]
        sum(losses).backward()
        assert module.frequency.steps == 1 and module.frequency.tokens == (target >= 0).sum()
        answers.append((sum(losses).detach(), hidden.grad, weight.grad))
    for one, other in zip(*answers, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-11)


def test_evaluation_neither_counts_nor_gates():
    problem = make_problem()
    module = build(problem).eval()
    weight = problem.weight.clone().requires_grad_()
    module(problem.hidden, weight, problem.target).backward()
    plain = problem.weight.clone().requires_grad_()
    gated_linear_cross_entropy(problem.hidden, plain, problem.target, None, problem.shard(0, 1)).backward()
    assert torch.equal(weight.grad, plain.grad) and module.frequency.steps == 0


def test_state_dict_holds_the_counts():
    problem = make_problem()
    first, second = build(problem), build(problem)
    first.begin_step(problem.target)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.frequency.appearances, first.frequency.appearances)
    assert second.frequency.appearances.sum() == (problem.target >= 0).sum()


def test_under_autocast_mixed_dtypes_are_cast():
    """The normal state of a mixed-precision trainer: hidden states in bf16, the weight in fp32."""
    problem = make_problem()
    module, weight = build(problem), problem.weight.float().requires_grad_()
    hidden = problem.hidden.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(hidden, weight, problem.target)
    loss.backward()
    assert loss.dtype == torch.float32 and weight.grad.dtype == torch.float32
    assert torch.allclose(loss.double(), module.eval()(problem.hidden, problem.weight, problem.target), rtol=1e-2)


def test_a_model_that_is_built_on_the_meta_device():
    problem = make_problem()
    with torch.device("meta"):
        module = build(problem, excluded_ids=(1,))
    module(problem.hidden, problem.weight, problem.target)
    assert module.current_gates().rare.any() and not module.current_gates().rare[1]


def test_a_copy_counts_on_its_own():
    """As an average of weights keeps one."""
    problem = make_problem()
    module = build(problem)
    module(problem.hidden, problem.weight, problem.target)
    twin = copy.deepcopy(module)
    module(problem.hidden, problem.weight, problem.target)
    assert (twin.frequency.steps, module.frequency.steps) == (1, 2)
    assert torch.equal(2 * twin.frequency.appearances, module.frequency.appearances)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, "target must be"),
        ({"hidden": torch.zeros(96, 16)}, ValueError, "one floating dtype"),
        ({"target": torch.zeros(96)}, ValueError, "target must be int64"),
        ({"reduction": "average"}, ValueError, "reduction is 'average'"),
    ],
)
def test_a_refused_call_is_not_counted(change, error, message):
    problem = make_problem()
    module = build(problem)
    right = {"hidden": problem.hidden, "weight": problem.weight, "target": problem.target}
    with pytest.raises(error, match=message):
        module(**(right | change))
    module(**right)
    assert module.frequency.steps == 1


def test_targets_that_are_no_ids():
    module = build(make_problem())
    with pytest.raises(TypeError, match="targets must be integer ids, got torch.float32"):
        module.begin_step(torch.zeros(3))
    module.begin_step(torch.zeros(3, dtype=torch.int32))
    assert module.frequency.appearances[0] == 3


def test_mixing_the_two_ways_of_counting_is_refused():
    problem = make_problem()
    module = build(problem)
    module(problem.hidden, problem.weight, problem.target)
    with pytest.raises(RuntimeError, match="begin_step"):
        module.begin_step(problem.target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"window_steps": 0}, "window_steps"),
        ({"alpha": None}, "give alpha or rare_fraction"),
        ({"rare_fraction": 0.2}, "not both"),
        ({"alpha": None, "rare_fraction": 1.0}, "below 1"),
        ({"window": "fading"}, "window is 'fading'"),
        ({"window_steps": 2.5}, "window_steps is 2.5"),
        ({"reference_batch_tokens": float("nan")}, "reference_batch_tokens is nan"),
        ({"excluded_ids": (3, 507)}, "excluded_ids has 507, outside the vocabulary of 507 ids"),
        ({"label_smoothing": 2.0}, "label_smoothing is 2.0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"alpha": "0.3"}, "alpha is '0.3', must be a number"),
        ({"ignore_index": "-100"}, "ignore_index is '-100', must be a whole number"),
        ({"ignore_index": None}, "ignore_index is None, must be a whole number"),
        ({"z_loss": None}, "z_loss is None, must be a number"),
        ({"chunk_tokens": 2.5}, "chunk_tokens is 2.5, must be a whole number"),
        ({"excluded_ids": 3}, "not iterable"),
        ({"excluded_ids": torch.tensor([1.5])}, "excluded_ids has 1.5, must be whole numbers"),
        ({"excluded_ids": torch.ones(507) > 0}, "excluded_ids are bool: of a mask give the ids"),
        ({"excluded_ids": [False] * 506 + [True]}, "excluded_ids are bool: of a mask give the ids"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        build(make_problem(), **options)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_activation_checkpointing_does_again_is_not_counted_again(use_reentrant, reduction):
    problem = make_problem()
    found, shares = [], []
    for checkpointed in (True, False):
        module, probe = build(problem), LossProbe()
        hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()

        def mean(hidden, weight, module=module, probe=probe):
            return module(hidden, weight, problem.target, reduction, probe).sum() / (problem.target >= 0).sum()

        for _ in range(2):
            loss = (
                checkpoint(mean, hidden, weight, use_reentrant=use_reentrant) if checkpointed else mean(hidden, weight)
            )
            loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad, module.frequency.appearances))
        shares.append(probe.gated_share(module.shard, None))
        assert module.frequency.steps == 2 and len(probe.token_losses) == 2
        module.undo_step()
        assert module.frequency.steps == 1
    assert shares[0] == shares[1] and shares[0].of_all > 0
    for with_it, without in zip(*found, strict=True):
        assert torch.equal(with_it, without)


@pytest.mark.parametrize("window", ["sliding", "exponential"])
def test_counts_that_were_asked_for_stay_what_they_were(window):
    problem = make_problem()
    module = build(problem, window=window)
    with torch.inference_mode():
        module.current_gates()  # as an evaluation before the first step does
    seen = []
    for _ in range(3):
        module(problem.hidden, problem.weight, problem.target)
        seen.append((module.frequency.appearances, module.frequency.appearances.clone()))
    module.undo_step()
    assert torch.equal(module.frequency.appearances, seen[1][1]) and seen[1][1].sum() < seen[2][1].sum()
    assert all(torch.equal(given, as_it_was) for given, as_it_was in seen)


def test_tensors_on_several_devices_are_refused():
    problem = make_problem()
    module = build(problem)
    with pytest.raises(ValueError, match="hidden, weight and target lie on several devices: cpu, meta"):
        module(problem.hidden, problem.weight.to("meta"), problem.target)
    gates = Gates(*(gate.to("meta") for gate in module.current_gates().__dict__.values()))
    with pytest.raises(ValueError, match="gates are on meta, weight on cpu: count targets that lie there"):
        gated_linear_cross_entropy(problem.hidden, problem.weight, problem.target, gates, problem.shard(0, 1))
