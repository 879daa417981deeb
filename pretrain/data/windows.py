"""The tokens of a split, and the windows in which they are evaluated: side by side, or sliding.

Letters: L window, s stride, B micro-batch size (windows), N tokens of the split.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from pretrain.data.prepared import PreparedData
from pretrain.errors import UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

IGNORED_TARGET = -100


@dataclass(frozen=True)
class TokenStream:
    """All documents of a split, one after another.

    Attributes:
        name: for messages.
        total: N.
        padding: an id to fill places with that nothing reads.
        read: int64 tokens from a place on, so many: ``read(start, count)``, both within the split.
    """

    name: str
    total: int
    padding: int
    read: Callable[[int, int], torch.Tensor]


def split_tokens(prepared: PreparedData, split: str) -> TokenStream:
    """The stream of a prepared split; tokens stay on disk until they are read."""
    dataset = IndexedDataset(prepared.prefix(split))
    dtype = dataset.index.dtype

    def read(start: int, count: int) -> torch.Tensor:
        ids = dataset.bin_reader.read(dtype=dtype, count=count, offset=start * DType.size(dtype))
        return torch.from_numpy(ids.astype(np.int64))

    total = int(dataset.sequence_lengths.sum(dtype=np.int64))
    return TokenStream(f"the {split} split of {prepared.folder}", total, max(prepared.tokenizer.pad_id, 0), read)


class EvaluationWindows:
    """This data-parallel rank's ``(tokens, targets)``, each int64 [B, L].

    Every token of the split but the first is a target once. Window k begins at token ``k s``. The first predicts all
    of its tokens, each later one its last s, so that they have more than ``L - s`` tokens before them. Places without
    a target hold -100 there. All ranks yield equally many micro-batches, the last ones all padding where need be. A
    split that is shorter than one window is a part of one.

    Args:
        stride: s, at most L; None: L, windows that do not overlap.
        limit: only the first so many windows; 0: all.

    Raises:
        UserError: the split has fewer than 2 tokens.
    """

    def __init__(
        self,
        stream: TokenStream,
        window: int,
        stride: int | None = None,
        *,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        limit: int = 0,
    ) -> None:
        self._stride = window if stride is None else stride
        if not 1 <= self._stride <= window:
            raise ValueError(f"stride is {stride}, must be from 1 to the window {window}")
        if stream.total < 2:
            raise UserError(
                f"{stream.name} has {stream.total} tokens, 2 are needed to predict one in a window of {window}; "
                "give more text"
            )
        count = 1 + max(0, -(-(stream.total - 1 - window) // self._stride))
        self._count = min(count, limit) if limit else count
        self._stream, self._window = stream, window
        self._micro_batch_size, self._rank, self._ranks = micro_batch_size, data_parallel_rank, data_parallel_size

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        return -(-self._count // (self._micro_batch_size * self._ranks))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        shape = (self._micro_batch_size, self._window)
        for turn in range(len(self)):
            tokens = torch.full(shape, self._stream.padding, dtype=torch.int64)
            targets = torch.full(shape, IGNORED_TARGET, dtype=torch.int64)
            first = (turn * self._ranks + self._rank) * self._micro_batch_size
            for row, number in enumerate(range(first, min(first + self._micro_batch_size, self._count))):
                start = number * self._stride
                piece = self._stream.read(start, min(self._window + 1, self._stream.total - start))
                known = self._window - self._stride if number else 0
                tokens[row, : len(piece) - 1] = piece[:-1]
                targets[row, known : len(piece) - 1] = piece[1 + known :]
            yield tokens, targets
