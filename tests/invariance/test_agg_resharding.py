"""Counts that were saved on one layout continue on another as if nothing had happened."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from agg import VocabShard
from tests.distributed import run_ranks
from tests.invariance.agg_layouts import groups, zipf_steps
from tests.invariance.test_agg_counts import KINDS, WINDOW, recounted

STEPS = zipf_steps(12, tokens=64)
STEPS[::2, 1:9] = torch.tensor([0, 127, 128, 255, 256, 383, 384, 506])  # the first and last ids of shards
AFTER = 6  # more than the window, so that its slots have been used again
# Each of the eight once before and once after: either degree grows, shrinks and stays.
CIRCLE = [(1, 1), (2, 2), (4, 1), (1, 4), (2, 4), (2, 1), (1, 2), (4, 2)]
SAME = [((2, 2), (2, 2)), ((4, 1), (4, 1))]
PAIRS = [
    *zip(CIRCLE, CIRCLE[1:] + CIRCLE[:1], strict=True),
    ((4, 1), (2, 2)),
    ((2, 2), (1, 4)),
    ((1, 4), (4, 1)),
    *SAME,
]


def windows_of(rank: int, layout: tuple[int, int]):
    dp_group, tp_group = groups(rank, *layout)
    shard = VocabShard.of_rank(507, dist.get_rank(tp_group), layout[1], tp_group)
    return [kind(shard, WINDOW, dp_group) for kind in KINDS], dist.get_rank(dp_group)


def save(rank: int, world_size: int, layout: tuple[int, int], steps: int, undo: bool):
    windows, dp_rank = windows_of(rank, layout)
    for frequency in windows:
        for step in STEPS[:steps]:
            frequency.update(step.chunk(layout[0])[dp_rank])
        if undo:
            frequency.update(STEPS[-1].chunk(layout[0])[dp_rank])
            frequency.undo_update()
    return [frequency.state_dict() for frequency in windows]


def load(rank: int, world_size: int, layout: tuple[int, int], saved, steps: int, load_all: bool):
    """First row, and for each window the counts, their sum and the steps, as loaded and after each further step."""
    windows, dp_rank = windows_of(rank, layout)
    seen = []
    for place, frequency in enumerate(windows):
        frequency.load_state_dict([part[place] for part in saved] if load_all else saved[rank][place])
        seen.append([(frequency.appearances.clone(), frequency.tokens.clone(), frequency.steps)])
        for step in STEPS[steps:]:
            frequency.update(step.chunk(layout[0])[dp_rank])
            seen[-1].append((frequency.appearances.clone(), frequency.tokens.clone(), frequency.steps))
    return frequency.shard.start, seen


def assert_continues(before: tuple[int, int], after: tuple[int, int], steps: int, undo: bool = False) -> None:
    """``steps``: before the state is saved."""
    saved = run_ranks(save, before[0] * before[1], before, steps, undo)
    whole = [recounted(kind, STEPS)[steps - 1 :] for kind in KINDS]
    for start, seen in run_ranks(load, after[0] * after[1], after, saved, steps, before != after):
        for mine, expected in zip(seen, whole, strict=True):
            for number, ((counts, tokens, its_steps), totals) in enumerate(zip(mine, expected, strict=True), steps):
                assert torch.equal(counts, totals[start : start + len(counts)])
                assert tokens == totals[-1] and its_steps == min(number, WINDOW)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_counts_continue_on_another_layout(before, after):
    assert_continues(before, after, AFTER)


@pytest.mark.parametrize("steps", [2, AFTER])
@pytest.mark.parametrize(("before", "after"), [((2, 2), (4, 1)), ((4, 1), (1, 2))])
def test_after_a_step_was_taken_back(before, after, steps):
    """Before the window is full, and once a step that left it has come back."""
    assert_continues(before, after, steps, undo=True)
