"""Rows that lie where untrained rows lie, on 1, 2 and 4 tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from agg import VocabShard
from pretrain.evaluation.subject import Embedding
from pretrain.evaluation.under_trained import under_trained_tokens
from tests.distributed import run_ranks

VOCAB, WIDTH = 507, 16
NEVER = list(range(40, 60))
PLANTED = [500, 3, 250, 126]  # from near to less near to the never-seen rows


class Pieces:
    """Id 3 has no text, id 126 a part of a character."""

    def decode(self, ids: list[int]) -> str:
        return {3: "", 126: "\ufffd"}.get(ids[0], f" word{ids[0]}")

    def piece(self, token_id: int) -> str:
        return f"<{token_id}>"


def counts() -> torch.Tensor:
    found = torch.arange(VOCAB) % 50 + 1
    found[NEVER] = 0
    return found


def embedding() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(VOCAB, WIDTH, generator=generator)
    corner = torch.randn(WIDTH, generator=generator) * 3
    rows[NEVER] = corner + 0.1 * rows[NEVER]
    for i, token_id in enumerate(PLANTED):
        rows[token_id] = (corner + 0.05 * 2**i * rows[token_id]) * 0.01  # length does not count
    return rows


def listed(rank: int, world_size: int, token_counts: torch.Tensor, multiple_of: int = 128) -> dict[str, Any]:
    group = dist.group.WORLD if world_size > 1 else None
    shard = VocabShard.of_rank(VOCAB, rank, world_size, group, multiple_of)
    rows = torch.full((len(shard), WIDTH), torch.nan)
    rows[: shard.real] = embedding()[shard.start : shard.start + shard.real]
    return under_trained_tokens(Embedding(rows, shard), token_counts, Pieces())


@pytest.mark.parametrize(("world_size", "multiple_of"), [(1, 128), (2, 128), (4, 128), (4, 1024), (4, 4)])
def test_tokens_near_the_never_seen_rows_come_first(world_size: int, multiple_of: int) -> None:
    whole = embedding().double()
    cosines = torch.nn.functional.cosine_similarity(whole, whole[NEVER].mean(0)[None])
    order = [i for i in cosines.sort(descending=True).indices.tolist() if i not in NEVER]
    assert order[:4] == PLANTED
    for found in run_ranks(listed, world_size, counts(), multiple_of):
        assert (found["reference"], found["reference_rows"]) == ("never_seen", len(NEVER))
        assert [entry["id"] for entry in found["tokens"]] == order[:50]
        for entry in found["tokens"]:
            assert entry["cosine"] == pytest.approx(float(cosines[entry["id"]]), abs=1e-9)
            assert entry["count"] == int(counts()[entry["id"]])
        assert [entry["text"] for entry in found["tokens"][:4]] == [" word500", "<3>", " word250", "<126>"]


def test_few_never_seen_ids_are_no_reference() -> None:
    few = counts()
    few[NEVER[7:]] = 1  # 7 are left: the 8 least seen, of which these are 7
    found = listed(0, 1, few)
    assert (found["reference"], found["reference_rows"]) == ("least_seen", 8)
    assert not {entry["id"] for entry in found["tokens"]} & {*NEVER[:7], 0}  # of count 1 the lowest id is 0
    few[NEVER[7]] = 0
    assert listed(0, 1, few)["reference"] == "never_seen"


def test_a_vocabulary_that_is_all_reference_lists_nothing() -> None:
    found = listed(0, 1, torch.zeros(VOCAB, dtype=torch.int64))
    assert found == {"reference": "never_seen", "reference_rows": VOCAB, "tokens": []}
