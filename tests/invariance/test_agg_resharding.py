"""Counts that were saved on one layout continue on another as if nothing had happened."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from agg import VocabShard
from tests.distributed import run_ranks
from tests.invariance.agg_layouts import groups, zipf_steps
from tests.invariance.test_agg_counts import KINDS, WINDOW

STEPS = zipf_steps(12, tokens=64)
SAVED_AFTER = 6  # more than the window, so that its slots have been used again
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


def save(rank: int, world_size: int, layout: tuple[int, int], undo: bool):
    windows, dp_rank = windows_of(rank, layout)
    for frequency in windows:
        for step in STEPS[:SAVED_AFTER]:
            frequency.update(step.chunk(layout[0])[dp_rank])
        if undo:
            frequency.update(STEPS[-1].chunk(layout[0])[dp_rank])
            frequency.undo_update()
    return [frequency.state_dict() for frequency in windows]


def load(rank: int, world_size: int, layout: tuple[int, int], saved, load_all: bool):
    """First row, and for each window the counts as loaded and after each further step."""
    windows, dp_rank = windows_of(rank, layout)
    seen = []
    for place, frequency in enumerate(windows):
        frequency.load_state_dict([part[place] for part in saved] if load_all else saved[rank][place])
        seen.append([(frequency.appearances.clone(), frequency.tokens.clone(), frequency.steps)])
        for step in STEPS[SAVED_AFTER:]:
            frequency.update(step.chunk(layout[0])[dp_rank])
            seen[-1].append((frequency.appearances.clone(), frequency.tokens.clone(), frequency.steps))
    return frequency.shard.start, seen


def without_interruption():
    shard = VocabShard.of_rank(507, 0, 1)
    seen = []
    for frequency in (kind(shard, WINDOW) for kind in KINDS):
        seen.append([])
        for step in STEPS:
            frequency.update(step)
            seen[-1].append((frequency.appearances.clone(), frequency.tokens.clone(), frequency.steps))
    return [of_window[SAVED_AFTER - 1 :] for of_window in seen]


def assert_continues(before: tuple[int, int], after: tuple[int, int], undo: bool = False) -> None:
    saved = run_ranks(save, before[0] * before[1], before, undo)
    whole = without_interruption()
    for start, seen in run_ranks(load, after[0] * after[1], after, saved, before != after):
        for mine, expected in zip(seen, whole, strict=True):
            for (counts, tokens, steps), (all_counts, all_tokens, all_steps) in zip(mine, expected, strict=True):
                assert torch.equal(counts, all_counts[start : start + len(counts)])
                assert tokens == all_tokens and steps == all_steps


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_counts_continue_on_another_layout(before, after):
    assert_continues(before, after)


@pytest.mark.parametrize(("before", "after"), [((2, 2), (4, 1)), ((4, 1), (1, 2))])
def test_after_a_step_was_taken_back(before, after):
    assert_continues(before, after, undo=True)
