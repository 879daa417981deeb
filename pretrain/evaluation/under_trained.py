"""Tokens that training hardly reached: those whose rows still lie where the rows of never-seen ids lie.

Ids that no training text holds are moved by nothing but what all rows share, so the mean of their rows is where an
untrained row is (Land and Bartolo 2024, arXiv 2405.05417). Letters: V unpadded vocabulary, V_local rows of a rank.
"""

from __future__ import annotations

from typing import Any

import torch

from pretrain.evaluation.geometry import cosines_to_mean
from pretrain.evaluation.subject import Codec, Embedding, token_text

LISTED = 50
LEAST_REFERENCE_ROWS = 8  # fewer never-seen ids do not tell where an untrained row is


def under_trained_tokens(
    embedding: Embedding, token_counts: torch.Tensor, codec: Codec, listed: int = LISTED
) -> dict[str, Any]:
    """The ids whose rows have the highest cosine with the mean of the reference rows, and what the reference is.

    The reference is the never-seen ids, or where they are fewer than eight the least seen hundredth of the vocabulary,
    eight at least. Reference rows are not listed. Over the ranks go a sum of D numbers and ``listed`` cosines; every
    rank gets the same.

    Args:
        token_counts: int64 [V].
    """
    weight, shard = embedding
    kind, reference = reference_ids(token_counts)
    own = torch.zeros(len(shard), dtype=torch.bool)
    own[: shard.real] = reference[shard.start : shard.start + shard.real]
    own = own.to(weight.device)
    cosines = cosines_to_mean(weight, shard, own)
    cosines[own] = -torch.inf
    cosines[shard.real :] = -torch.inf
    best, rows = cosines.topk(min(listed, len(shard)))  # shards are of one size
    values, ids = shard.all_gather(best).flatten(), shard.all_gather(rows + shard.start).flatten()
    found = [(-value, token_id) for value, token_id in zip(values.tolist(), ids.tolist(), strict=True)]
    return {
        "reference": kind,
        "reference_rows": int(reference.sum()),
        "tokens": [
            {"id": i, "text": token_text(codec, i), "count": int(token_counts[i]), "cosine": -negative}
            for negative, i in sorted(found)[:listed]
            if negative < torch.inf
        ],
    }


def reference_ids(token_counts: torch.Tensor) -> tuple[str, torch.Tensor]:
    """What the reference is called, and which ids it holds: bool [V]."""
    never = token_counts == 0
    if int(never.sum()) >= LEAST_REFERENCE_ROWS:
        return "never_seen", never
    least = torch.zeros_like(never)
    rows = max(LEAST_REFERENCE_ROWS, len(token_counts) // 100)
    least[token_counts.sort(stable=True).indices[:rows]] = True
    return "least_seen", least
