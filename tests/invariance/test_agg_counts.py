"""Counts over the window and gates made of them, on data-parallel x tensor-parallel ranks, equal a plain recount."""

from __future__ import annotations

import copy
import itertools
from inspect import isfunction, signature

import pytest
import torch
import torch.distributed as dist

from agg import (
    AdaptiveGradientGating,
    DecayedTokenFrequency,
    TokenFrequency,
    VocabShard,
    alpha_of_rare_fraction,
    rarity_gates,
)
from agg.histogram import NEWS
from tests.distributed import run_ranks
from tests.invariance.agg_layouts import groups, zipf_steps

KINDS = (TokenFrequency, DecayedTokenFrequency)
WINDOW, STEPS = 4, 7
GATES = ("rare", "g1", "g2")


def recounted(kind, steps, window: int = WINDOW) -> list[torch.Tensor]:
    """[512] and one more for all of them, after each step: how often each id was a target, without :mod:`agg`."""
    histograms = [torch.bincount(step[step >= 0], minlength=513) for step in steps]
    for histogram in histograms:
        histogram[-1] = histogram.sum()
    if kind is TokenFrequency:
        return [sum(histograms[max(0, end - window) : end]) for end in range(1, len(steps) + 1)]
    totals = [torch.zeros(513, dtype=torch.float64)]
    for histogram in histograms:
        totals.append(totals[-1] * (1 - 1 / window) + histogram)
    return totals[1:]


def counts_and_gates(counts: torch.Tensor, tokens: torch.Tensor, shard: VocabShard) -> dict[str, torch.Tensor]:
    common = {"tokens": tokens, "reference_batch_tokens": 64, "shard": shard, "excluded_ids": (1, 500)}
    gates = rarity_gates(counts, alpha=0.5, **common)
    return {
        "counts": counts.clone(),
        "tokens": tokens.clone(),
        "alpha": alpha_of_rare_fraction(counts, 0.3, **common),
        **{name: getattr(gates, name) for name in GATES},
    }


def count_and_gate(rank: int, world_size: int, data_parallel: int, tensor_parallel: int):
    """First row, and for each window what there is after each step."""
    dp_group, tp_group = groups(rank, data_parallel, tensor_parallel)
    shard = VocabShard.of_rank(507, dist.get_rank(tp_group), tensor_parallel, tp_group)
    windows = []
    for frequency in (kind(shard, WINDOW, dp_group) for kind in KINDS):
        windows.append([])
        for targets in zipf_steps(STEPS):
            frequency.update(targets.chunk(data_parallel)[dist.get_rank(dp_group)])
            windows[-1].append(counts_and_gates(frequency.appearances, frequency.tokens, shard))
    return shard.start, windows


def whole_counts_and_gates():
    shard = VocabShard.of_rank(507, 0, 1)
    return [
        [counts_and_gates(totals[:-1], totals[-1], shard) for totals in recounted(kind, zipf_steps(STEPS))]
        for kind in KINDS
    ]


def wrong_counts(ranks, whole) -> set[str]:
    """What differs at all, on any rank, in any step, in either window."""
    return {
        name
        for start, windows in ranks
        for mine, expected in zip(windows, whole, strict=True)
        for step, of_step in zip(mine, expected, strict=True)
        for name, got in step.items()
        if not torch.equal(got, of_step[name][start : start + len(got)] if got.dim() else of_step[name])
    }


def test_the_steps_have_teeth():
    """From the third step on, before and after the window moves, many gates are strictly between 0 and 1."""
    for kind, history in zip(KINDS, whole_counts_and_gates(), strict=True):
        for step in history[2:]:
            inside = (step["g1"] > 0) & (step["g1"] < 1) & (step["g2"] > 0) & (step["g2"] < 1)
            assert (inside & (step["g1"] != step["g2"])).sum() >= 100, kind
            assert not step["rare"][step["counts"] > 100].any() and step["rare"].any()
            # The mean over the rare ids of each half is another, so that a rank can't do with its own.
            low, high = (
                step["counts"][rows][step["rare"][rows]].double().mean() for rows in (slice(256), slice(256, 512))
            )
            assert (low / high - 1).abs() > 0.2
            assert 0 < step["alpha"] < 0.5


@pytest.mark.parametrize("data_parallel", [1, 2, 4])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_counts_and_gates(data_parallel, tensor_parallel):
    ranks = run_ranks(count_and_gate, data_parallel * tensor_parallel, data_parallel, tensor_parallel)
    assert wrong_counts(ranks, whole_counts_and_gates()) == set()


def stored_slots(rank: int, world_size: int, data_parallel: int, tensor_parallel: int):
    dp_group, tp_group = groups(rank, data_parallel, tensor_parallel)
    shard = VocabShard.of_rank(507, dist.get_rank(tp_group), tensor_parallel, tp_group)
    frequency = TokenFrequency(shard, 10, dp_group)
    slots = []
    for targets in zipf_steps(13, tokens=64):
        frequency.update(targets.chunk(data_parallel)[dist.get_rank(dp_group)])
        slots.append(frequency.state_dict()["slots"].tolist())
    return dist.get_rank(dp_group), slots


@pytest.mark.parametrize("layout", [(1, 1), (4, 1), (2, 2)])
def test_a_rank_stores_its_own_slots_of_the_window_alone(layout):
    for dp_rank, slots in run_ranks(stored_slots, layout[0] * layout[1], *layout):
        for step, its_slots in enumerate(slots):
            assert its_slots == [slot for slot in range(min(step + 1, 10)) if slot % layout[0] == dp_rank]


def collectives() -> list[str]:
    """Names in torch.distributed of what talks to the other ranks of a group."""
    module = dist.distributed_c10d
    functions = {name: getattr(module, name) for name in module.__all__ if not name.startswith("get_")}
    return [name for name, f in functions.items() if isfunction(f) and "group" in signature(f).parameters]


def record_collectives(group: dist.ProcessGroup) -> list:
    """From now on: name, dtype and shape of the first argument, whether it is of ``group``, whether asynchronous."""
    calls = []

    def recorded(name, function):
        def call(*arguments, **options):
            tensor = arguments[0] if arguments else None
            told = (tensor.dtype, tuple(tensor.shape)) if isinstance(tensor, torch.Tensor) else None
            calls.append((name, told, options.get("group") is group, options.get("async_op", False)))
            return function(*arguments, **options)

        return call

    for name in collectives():
        setattr(dist, name, recorded(name, getattr(dist, name)))
    return calls


def collectives_of_updates(rank: int, world_size: int, kind, data_parallel: int, tensor_parallel: int):
    dp_group, tp_group = groups(rank, data_parallel, tensor_parallel)
    shard = VocabShard.of_rank(507, dist.get_rank(tp_group), tensor_parallel, tp_group)
    frequency = kind(shard, 3, dp_group)
    calls = record_collectives(dp_group)
    of_updates = []
    for targets in zipf_steps(5, tokens=64):
        calls.clear()
        frequency.update(targets.chunk(data_parallel)[dist.get_rank(dp_group)])
        assert frequency.tokens > 0 and frequency.appearances.any() and frequency.steps > 0
        of_updates.append(list(calls))
    frequency.undo_update()
    frequency.state_dict()
    assert calls == of_updates[-1]  # none of these talks to other ranks
    return len(shard), of_updates


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_is_one_asynchronous_all_reduce_of_int32(kind):
    """Of V_local counts, their sum, what is wrong on a rank, and how many steps it counted."""
    for rows, of_updates in run_ranks(collectives_of_updates, 4, kind, 2, 2):
        size = rows + 1 + NEWS
        assert of_updates == [[("all_reduce", (torch.int32, (size,)), True, True)]] * 5
    assert NEWS < 10


def collectives_of_a_step(rank: int, world_size: int, data_parallel: int, threshold: dict):
    """What :meth:`begin_step` starts, and what the gates after it."""
    dp_group, tp_group = groups(rank, data_parallel, world_size // data_parallel)
    shard = VocabShard.of_rank(507, dist.get_rank(tp_group), world_size // data_parallel, tp_group)
    module = AdaptiveGradientGating(shard, window_steps=3, data_parallel_group=dp_group, **threshold)
    calls = record_collectives(tp_group)
    module.begin_step(zipf_steps(3)[0].chunk(data_parallel)[dist.get_rank(dp_group)])
    of_begin, gathering = len(calls), module.frequency._gathering
    assert (gathering is not None and gathering._work is not None) == (data_parallel == 1)  # not awaited yet
    assert (module.frequency._pending is not None) == (data_parallel > 1)  # nor the all-reduce
    assert module.current_gates().rare_ids.any() and module.current_gates() is module.gates
    told = [(name, of_tp, asynchronous) for name, _, of_tp, asynchronous in calls]
    return told[:of_begin], told[of_begin:]


@pytest.mark.parametrize("threshold", [{"alpha": 9.0}, {"rare_fraction": 0.3}])
def test_gates_of_a_step_take_one_gather(threshold):
    """Over the tensor-parallel group, in the background where the counts need not be reduced before."""
    reduce, gather = ("all_reduce", False, True), ("all_gather", True, True)
    assert run_ranks(collectives_of_a_step, 4, 2, threshold) == [([reduce], [gather])] * 4
    assert run_ranks(collectives_of_a_step, 4, 1, threshold) == [([gather], [])] * 4


def gates_of_changing_counts(rank: int, world_size: int, data_parallel: int, tensor_parallel: int, window: str):
    """First row, and the gates at each turn: no gather that was begun before may be taken for a later one."""
    dp_group, tp_group = groups(rank, data_parallel, tensor_parallel)
    shard = VocabShard.of_rank(507, dist.get_rank(tp_group), tensor_parallel, tp_group)
    options = {"window_steps": 3, "window": window, "data_parallel_group": dp_group}
    module = AdaptiveGradientGating(shard, rare_fraction=0.4, **options)
    steps = (step.chunk(data_parallel)[dist.get_rank(dp_group)] for step in zipf_steps(8, tokens=256))
    seen = []
    module.begin_step(next(steps))
    module.begin_step(next(steps))
    seen.append(module.current_gates())
    module.begin_step(next(steps))
    saved = module.get_extra_state()
    module.undo_step()
    seen.append(module.current_gates())
    module.begin_step(next(steps))
    if rank == 0:
        copy.deepcopy(module)  # by one rank alone, so that it may not leave a collective to be done again
        assert (module.frequency._gathering is not None) == (data_parallel == 1)
    seen.append(module.current_gates())
    module.begin_step(next(steps))
    twin = copy.deepcopy(module)
    module.begin_step(next(steps))
    seen += [twin.current_gates(), module.current_gates()]
    module.begin_step(next(steps))
    module.set_extra_state(saved)
    seen.append(module.current_gates())
    return shard.start, [{name: getattr(gates, name) for name in GATES} for gates in seen]


def exact_gates_of_changing_counts(window: str = "sliding"):
    ((_, exact),) = run_ranks(gates_of_changing_counts, 1, 1, 1, window)
    distinct = [exact[turn]["g1"] for turn in range(1, 6)]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(distinct, 2))
    return exact


def gates_that_differ(layout: tuple[int, int], exact, window: str = "sliding") -> set[tuple[int, str]]:
    return {
        (turn, name)
        for start, seen in run_ranks(gates_of_changing_counts, layout[0] * layout[1], *layout, window)
        for turn, (mine, whole) in enumerate(zip(seen, exact, strict=True))
        for name, gate in mine.items()
        if not torch.equal(gate, whole[name][start : start + len(gate)])
    }


@pytest.fixture(params=["gloo", "as NCCL"])
def tells_refusals(request, monkeypatch) -> bool:
    """Where tensor-parallel ranks tell none of what they refuse, they gather less often."""
    if request.param == "as NCCL":
        monkeypatch.setattr(VocabShard, "tells_refusals", False)
    return request.param == "gloo"


@pytest.mark.parametrize("window", ["sliding", "exponential"])
@pytest.mark.parametrize("layout", [(1, 2), (1, 4), (2, 2)])
def test_gates_follow_counts_that_change_after_a_gather_was_begun(layout, window, tells_refusals):
    assert gates_that_differ(layout, exact_gates_of_changing_counts(window), window) == set()


def test_a_gather_from_before_the_counts_changed_would_show(monkeypatch, tells_refusals):
    """After others were loaded, and after a step was taken back, unless it was heard of; else another was begun."""
    exact = exact_gates_of_changing_counts()
    awaits = lambda self: self._gathering and self._gathering.get()  # noqa: E731
    monkeypatch.setattr(TokenFrequency, "_forget_gathered", awaits)
    stale = {5} if tells_refusals else {1, 5}
    assert {turn for turn, name in gates_that_differ((1, 2), exact) if name == "g1"} == stale
