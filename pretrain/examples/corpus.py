"""A text without a download: what your data loader gives in the other examples."""

from __future__ import annotations

import torch

VOCAB_SIZE = 1000


def zipf_batch(step: int, sequences: int = 16, length: int = 33) -> torch.Tensor:
    """int64 [sequences, length]: ids by Zipf's law, every second one following from the one before; -100 pads.

    The global batch of an optimizer step: the same on every rank, each takes its own rows.
    """
    draw = torch.Generator().manual_seed(step)
    uniform = torch.rand(sequences, length, generator=draw, dtype=torch.float64)
    ids = (VOCAB_SIZE**uniform).long() - 1  # log-uniform: id k has a share of about 1 / (k + 1)
    ids[:, 1::2] = (7 * ids[:, : length - 1 : 2] + 3) % VOCAB_SIZE
    ends = torch.randint(length // 2, length + 1, (sequences, 1), generator=draw)
    return ids.where(torch.arange(length) < ends, -100)
