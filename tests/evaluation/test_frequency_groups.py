"""Perplexity and distinct predictions by frequency group."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from pretrain.evaluation.frequency_groups import GroupedPerplexity, frequency_deciles, frequency_groups
from pretrain.evaluation.group_names import GROUPS
from tests.distributed import run_ranks

VOCAB, TOKENS = 53, 400


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Groups, losses, targets with every seventh ignored, predictions."""
    generator = torch.Generator().manual_seed(2)
    groups = frequency_groups(torch.randint(0, 9, (VOCAB,), generator=generator))
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    targets[::7] = -100
    predictions = torch.randint(0, VOCAB // 2, (TOKENS,), generator=generator)
    predictions[::7] = VOCAB - 1  # only where the target is ignored
    return groups, torch.rand(TOKENS, generator=generator) * 9, targets, predictions


def test_groups_are_shares_of_the_sorted_vocabulary() -> None:
    counts = torch.tensor([0, 50, 10, 10, 7, 90, 10, 1, 3, 0])
    assert frequency_groups(counts).tolist() == [2, 0, 0, 1, 1, 0, 1, 1, 1, 2]
    assert frequency_groups(counts).dtype == torch.int8


@pytest.mark.parametrize("vocab_size", [10, 100, 507, 16_000])
def test_thirty_fifty_twenty(vocab_size: int) -> None:
    sizes = torch.bincount(frequency_groups(torch.arange(vocab_size)).long(), minlength=3).tolist()
    assert sum(sizes) == vocab_size
    assert sizes[:2] == [vocab_size * 3 // 10, vocab_size * 8 // 10 - vocab_size * 3 // 10]


def test_ties_are_broken_by_id() -> None:
    assert frequency_groups(torch.full((1000,), 4)).tolist() == [0] * 300 + [1] * 500 + [2] * 200


def test_deciles_are_tenths_of_the_ids_that_occur() -> None:
    counts = torch.cat([torch.zeros(3), torch.full((10,), 5), torch.arange(6, 16)]).long()
    rising = [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    assert frequency_deciles(counts).tolist() == [10] * 3 + [5, 5, 6, 6, 7, 7, 8, 8, 9, 9] + rising
    assert frequency_deciles(counts).dtype == torch.int8
    sizes = torch.bincount(frequency_deciles(torch.arange(507)).long()).tolist()
    assert sizes[10] == 1 and sum(sizes) == 507 and set(sizes[:10]) == {50, 51}
    assert frequency_deciles(torch.tensor([2, 0, 1])).tolist() == [0, 10, 5]  # some tenths are empty
    assert frequency_deciles(torch.zeros(2).long()).tolist() == [10, 10]


def test_numbers_are_those_of_the_definition() -> None:
    groups, losses, targets, predictions = batch()
    found = GroupedPerplexity(groups)
    for part in range(0, TOKENS, 64):
        piece = slice(part, part + 64)
        found.update(losses[piece], targets[piece], predictions=predictions[piece])
    kept = targets != -100
    for i, name in [*enumerate(GROUPS), (None, "total")]:
        member = kept.clone()
        member[kept] &= True if i is None else groups[targets[kept]] == i
        assert found.perplexity()[name] == pytest.approx(math.exp(losses[member].double().mean()))
        assert found.mean_loss()[name] == pytest.approx(float(losses[member].double().mean()))
        assert found.target_tokens()[name] == int(member.sum())
        assert found.unique_targets()[name] == len(set(targets[member].tolist()))
        distinct = set(predictions[kept].tolist())
        assert found.unique_tokens()[name] == sum(i is None or int(groups[token]) == i for token in distinct)


def test_a_group_without_targets_has_no_perplexity() -> None:
    found = GroupedPerplexity(frequency_groups(torch.arange(10, 0, -1)))
    assert found.perplexity() == {"frequent": None, "medium": None, "rare": None, "total": None}
    found.update(torch.tensor([2.0, 1e6]), torch.tensor([0, 4]))
    assert found.perplexity() == {
        "frequent": pytest.approx(math.exp(2)),
        "medium": math.inf,
        "rare": None,
        "total": math.inf,
    }


def numbers(found: GroupedPerplexity) -> list[dict[str, float | None] | dict[str, int]]:
    return [found.perplexity(), found.unique_tokens(), found.target_tokens(), found.unique_targets()]


def evaluate_share(rank: int, world_size: int, share: int) -> list[dict[str, float | None] | dict[str, int]]:
    """``share`` tokens for each rank; the last ones may get none."""
    groups, losses, targets, predictions = batch()
    piece = slice(rank * share, (rank + 1) * share)
    found = GroupedPerplexity(groups)
    found.update(losses[piece], targets[piece], predictions=predictions[piece])
    return numbers(found.reduce(dist.group.WORLD))


@pytest.mark.parametrize(("world_size", "share"), [(2, 200), (4, 100), (3, 200)])
def test_ranks_together_see_what_one_sees(world_size: int, share: int) -> None:
    groups, losses, targets, predictions = batch()
    one = GroupedPerplexity(groups)
    one.update(losses, targets, predictions=predictions)
    alone = numbers(one.reduce(None))
    for together in run_ranks(evaluate_share, world_size, share):
        assert together[0] == pytest.approx(alone[0])
        assert together[1:] == alone[1:]


def test_reduce_is_for_once() -> None:
    groups, losses, targets, _ = batch()
    found = GroupedPerplexity(groups).reduce(None)
    with pytest.raises(RuntimeError, match="twice"):
        found.reduce(None)
    with pytest.raises(RuntimeError, match="update after reduce"):
        found.update(losses, targets)
