"""Gates against the formulas, written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from agg import VocabShard, alpha_of_rare_fraction, rarity_gates
from tests.distributed import run_ranks

SHARD = VocabShard(0, 8, 7)  # the last row only pads


def gates_of(counts, **options):
    options = {"tokens": 100, "alpha": 10.0, "reference_batch_tokens": 100, "shard": SHARD} | options
    return rarity_gates(torch.tensor(counts), **options)


def test_by_hand():
    gates = gates_of([50, 30, 12, 4, 2, 0, 2, 0], excluded_ids=(6,))
    assert gates.rare.tolist() == [False, False, False, True, True, True, False, False]
    assert gates.g1.tolist() == [1, 1, 1, 1, 1, 0, 1, 1]  # r = 4, 2, 0 per 100 tokens, at most 1
    assert gates.g2.tolist() == [1, 1, 1, 1, 1, 0, 1, 1]  # the mean over the rare is 2
    gates = gates_of([50, 30, 12, 6, 1, 2, 2, 0], tokens=1000, excluded_ids=(6,), alpha=1.0)
    assert torch.allclose(gates.g1, torch.tensor([1, 1, 1, 0.6, 0.1, 0.2, 1, 1]))
    assert torch.allclose(gates.g2, torch.tensor([1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1]))


def test_alpha_keeps_its_meaning_when_the_batch_changes():
    counts = torch.tensor([500, 300, 120, 40, 20, 5, 5, 0])
    small = rarity_gates(counts, tokens=990, alpha=0.5, reference_batch_tokens=10, shard=SHARD)
    large = rarity_gates(counts * 64, tokens=990 * 64, alpha=0.5, reference_batch_tokens=10, shard=SHARD)
    assert torch.equal(small.rare, large.rare) and torch.equal(small.g1, large.g1) and torch.equal(small.g2, large.g2)
    assert small.rare.tolist() == [False, False, False, True, True, True, True, False]


def test_what_occurs_alpha_times_is_not_rare_whatever_the_unit():
    """49 * (1 / 49) is below 1."""
    for unit in range(3, 400):
        counts = [3 * unit - 5, 3, 2, 0, 0, 0, 0, 0]
        rare = gates_of(counts, tokens=3 * unit, alpha=1.0, reference_batch_tokens=unit).rare.tolist()
        assert rare[:3] == [False, False, True], unit


def test_nothing_counted_yet():
    gates = gates_of([0] * 8, tokens=0)
    assert gates.rare.tolist() == [True] * 7 + [False]
    assert torch.isfinite(gates.g1).all() and torch.isfinite(gates.g2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"reference_batch_tokens": 0}, "reference_batch_tokens is 0"),
        ({"shard": VocabShard(0, 4, 7)}, "this shard has 4 rows"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        gates_of([1] * 8, **options)


def fraction_gates(counts, fraction, **options):
    common = {"tokens": sum(counts), "reference_batch_tokens": 32, "shard": VocabShard(0, len(counts), len(counts))}
    common |= options
    appearances = torch.tensor(counts)
    alpha = alpha_of_rare_fraction(appearances, fraction, **common)
    return rarity_gates(appearances, alpha=alpha, **common)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("scale", [1, 1000])
def test_rare_fraction_is_what_is_asked_for(fraction, scale):
    """Whatever the corpus: the same share for counts a thousand times as large."""
    counts = [scale * (3 * k + 1) for k in range(100)]
    assert fraction_gates(counts, fraction).rare.sum() == int(100 * fraction)


def test_rare_fraction_with_equal_counts_special_and_unseen_ids():
    counts = [5, 5, 5, 5, 9, 9, 20, 30, 0, 0, 1, 1]
    assert fraction_gates(counts, 0.5).rare.tolist() == [True] * 4 + [False] * 4 + [True] * 4  # 6 of 10; 2 are further
    assert fraction_gates(counts, 0.3).rare.tolist() == [False] * 8 + [True] * 4  # 2 of 10; 6 are further
    with pytest.raises(ValueError, match="excluded_ids are bool"):
        fraction_gates(counts, 0.6, excluded_ids=torch.arange(len(counts)) > 7)
    assert fraction_gates(counts, 0.6, excluded_ids=(8, 10)).rare.tolist() == (
        [True] * 4 + [False] * 4 + [False, True, False, True]
    )
    assert not fraction_gates([7, 3], 0.1).rare.any() and not fraction_gates([5, 5, 5], 0.9).rare.any()
    unseen = fraction_gates([7, 3, 0, 0], 0.1)
    assert unseen.rare.tolist() == [False, False, True, True]
    assert not fraction_gates([0, 0, 0], 0.5).rare.any()


@pytest.mark.parametrize("fraction", [0.3, 0.39, 0.41, 0.5])
def test_rare_fraction_where_many_ids_occurred_once(fraction):
    """As on a young corpus: 40 of 100 ids with one occurrence are nearer to the share than none."""
    counts = [1] * 40 + [2] * 30 + list(range(3, 33))
    assert fraction_gates(counts, fraction).rare.sum() == 40


def split_fraction(rank, world_size):
    shard = VocabShard.of_rank(507, rank, world_size, dist.group.WORLD)
    counts = (4000 / (1 + torch.arange(512))).long()
    common = {"tokens": 27_000, "reference_batch_tokens": 64, "shard": shard, "excluded_ids": (3, 400)}
    local = counts[shard.start : shard.stop]
    return rarity_gates(local, alpha=alpha_of_rare_fraction(local, 0.3, **common), **common).rare


@pytest.mark.parametrize("world_size", [2, 4])
def test_rare_fraction_on_a_split_vocabulary(world_size):
    (whole,) = run_ranks(split_fraction, 1)
    assert torch.equal(torch.cat(run_ranks(split_fraction, world_size)), whole)
    assert 120 <= whole.sum() <= 152


@pytest.mark.parametrize("fraction", [0.0, 1.0, float("nan")])
def test_bad_rare_fraction(fraction):
    with pytest.raises(ValueError, match="rare_fraction is"):
        fraction_gates([1, 2, 3], fraction)


def test_shards_tile_the_padded_vocabulary():
    for world_size in (1, 2, 4):
        shards = [VocabShard.of_rank(507, rank, world_size) for rank in range(world_size)]
        assert [shard.start for shard in shards] == [i * 512 // world_size for i in range(world_size)]
        assert shards[-1].stop == 512 and sum(shard.real for shard in shards) == 507
    with pytest.raises(ValueError, match="does not divide over 3 ranks"):
        VocabShard.of_rank(507, 0, 3)
    with pytest.raises(ValueError, match="rank 4 is not in a world of 4"):
        VocabShard.of_rank(507, 4, 4)


@pytest.mark.parametrize("threshold", [{"alpha": 0.5}, {"rare_fraction": 0.3}])
def test_a_part_of_the_vocabulary_without_the_group_that_holds_the_rest_is_refused(threshold):
    make = rarity_gates if "alpha" in threshold else alpha_of_rare_fraction
    with pytest.raises(ValueError, match=r"\[4, 8\) is a part of 8 ids, but names no group"):
        make(torch.ones(4), tokens=8, reference_batch_tokens=8, shard=VocabShard(4, 8, 8), **threshold)
