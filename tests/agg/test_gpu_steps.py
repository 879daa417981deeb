"""Steps on a GPU: nothing waits for it, and what is wrong is told later; and what is checked on one."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from agg import (
    AdaptiveGradientGating,
    LossProbe,
    TokenFrequency,
    VocabShard,
    frequency,
    step_counts,
)
from tests.agg import on_device as device_checks
from tests.agg.problems import make_problem, weigh

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
    complaint = step_counts.StepCounts._complaint
    monkeypatch.setattr(step_counts.StepCounts, "_complaint", on_the_host(complaint))
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
