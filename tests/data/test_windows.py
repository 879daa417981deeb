"""Windows of a split: every token is predicted once, whoever shares them and however they slide."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from pretrain.data.prepared import PreparedData
from pretrain.data.windows import IGNORED_TARGET, EvaluationWindows, TokenStream, split_tokens
from pretrain.errors import UserError
from pretrain.recipe import Recipe


@pytest.fixture(scope="module")
def prepared(prepared_recipe: Recipe) -> PreparedData:
    return PreparedData.open(prepared_recipe)


def counted(total: int) -> TokenStream:
    """Tokens that say where they stand."""
    places = torch.arange(100, 100 + total)
    return TokenStream("the test split", total, 7, lambda start, count: places[start : start + count])


def shared(stream: TokenStream, ranks: int, *window: int, limit: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The micro-batches of all ranks; all have equally many, of one shape."""
    parts = [
        EvaluationWindows(
            stream, *window, micro_batch_size=3, data_parallel_rank=rank, data_parallel_size=ranks, limit=limit
        )
        for rank in range(ranks)
    ]
    batches = [list(part) for part in parts]
    assert {len(part) for part in parts} == {len(batch) for batch in batches} == {len(batches[0])}
    flat = [pair for turn in zip(*batches, strict=True) for pair in turn]
    for tokens, targets in flat:
        assert tokens.shape == targets.shape == (3, window[0])
        assert tokens.dtype == targets.dtype == torch.int64
    return flat


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("length", [7, 16, 100_000])
def test_a_prepared_split_side_by_side(prepared: PreparedData, ranks: int, length: int) -> None:
    shard = IndexedDataset(prepared.prefix("valid"))
    stream = np.concatenate([shard[i] for i in range(len(shard))]).astype(np.int64)
    flat = shared(split_tokens(prepared, "valid"), ranks, length)
    kept = [targets != IGNORED_TARGET for _, targets in flat]
    targets = torch.cat([pair[1][there] for pair, there in zip(flat, kept, strict=True)])
    inputs = torch.cat([pair[0][there] for pair, there in zip(flat, kept, strict=True)])
    np.testing.assert_array_equal(targets.numpy(), stream[1:])
    np.testing.assert_array_equal(inputs.numpy(), stream[:-1])
    padding = torch.cat([pair[0][~there] for pair, there in zip(flat, kept, strict=True)])
    assert (padding == prepared.tokenizer.pad_id).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("window", "stride"), [(8, 1), (8, 3), (8, 8), (1, 1), (64, 14)])
@pytest.mark.parametrize("total", [2, 8, 9, 10, 12, 61])
def test_sliding_windows_predict_each_token_once_with_context(ranks: int, window: int, stride: int, total: int) -> None:
    predicted = []
    for tokens, targets in shared(counted(total), ranks, window, stride):
        for row in range(3):
            for place in (targets[row] != IGNORED_TARGET).nonzero().squeeze(1).tolist():
                target = int(targets[row, place])
                context = tokens[row, : place + 1].tolist()
                assert context == list(range(target - len(context), target))
                assert len(context) >= min(window - stride + 1, target - 100)
                predicted.append(target)
    assert sorted(predicted) == list(range(101, 100 + total))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("stride", "targets"), [(16, 5 * 16), (4, 16 + 4 * 4)])
def test_limited_windows_are_the_first(ranks: int, stride: int, targets: int) -> None:
    flat = shared(counted(200), ranks, 16, stride, limit=5)
    kept = torch.cat([pair[1][pair[1] != IGNORED_TARGET] for pair in flat])
    assert sorted(kept.tolist()) == list(range(101, 101 + targets))


def test_split_of_one_token_is_refused(prepared: PreparedData, tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "valid.bin"), dtype=np.uint16)
    builder.add_document([2], [1])
    builder.finalize(str(tmp_path / "valid.idx"))
    stream = split_tokens(dataclasses.replace(prepared, folder=tmp_path), "valid")
    with pytest.raises(UserError, match="valid split .* has 1 tokens, 2 are needed .* window of 8"):
        EvaluationWindows(stream, 8, micro_batch_size=1)


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_must_be_in_the_window(stride: int) -> None:
    with pytest.raises(ValueError, match="must be from 1 to the window 8"):
        EvaluationWindows(counted(20), 8, stride, micro_batch_size=1)
