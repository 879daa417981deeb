import dataclasses
import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from pretrain.data.loader import TrainingBatches, training_dataset
from pretrain.data.prepare import prepare
from pretrain.data.prepared import PreparedData, steps_per_epoch
from pretrain.errors import UserError
from pretrain.recipe import ModelRecipe, Recipe
from tests.data.helpers import text_recipe
from tests.distributed import run_ranks


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = text_recipe(tmp_path_factory.mktemp("loader"))
    prepare(recipe)
    return recipe


@pytest.fixture(scope="module")
def prepared(recipe: Recipe) -> PreparedData:
    return PreparedData.open(recipe)


@pytest.fixture(scope="module")
def dataset(prepared: PreparedData, recipe: Recipe) -> Any:
    return training_dataset(prepared, recipe)


def steps_of(dataset: Any, rank: int, ranks: int, consumed: int = 0) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    batches = TrainingBatches(
        dataset,
        micro_batch_size=2,
        global_batch_size=8,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        consumed_samples=consumed,
    )
    return [step for step, _ in zip(batches, range(6), strict=False)]


def rows(step: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for pair in step for row in torch.cat(pair, dim=1)]


def stream_of(prepared: PreparedData, split: str) -> np.ndarray:
    shard = IndexedDataset(prepared.prefix(split))
    return np.concatenate([shard[i] for i in range(len(shard))]).astype(np.int64)


def test_samples_are_shifted_by_one_and_complete(dataset: Any, recipe: Recipe, prepared: PreparedData) -> None:
    assert len(dataset) >= recipe.batch.train_steps * recipe.batch.global_batch_size
    counts = np.zeros(prepared.vocab_size, dtype=np.int64)
    for i in range(len(dataset)):
        tokens, labels = dataset[i]["tokens"], dataset[i]["labels"]
        assert tokens.dtype == labels.dtype == torch.int64 and tokens.shape == labels.shape == (16,)
        assert torch.equal(tokens[1:], labels[:-1])
        np.add.at(counts, labels.numpy(), 1)
    epochs = counts.sum() / prepared.train_tokens
    seen = prepared.token_counts > 50
    np.testing.assert_allclose(counts[seen], epochs * prepared.token_counts[seen], rtol=0.2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_samples_of_a_step_do_not_depend_on_the_ranks(dataset: Any, ranks: int) -> None:
    alone = steps_of(dataset, 0, 1)
    shared = [steps_of(dataset, rank, ranks) for rank in range(ranks)]
    for number, step in enumerate(alone):
        together = [row for rank in range(ranks) for row in rows(shared[rank][number])]
        assert len(together) == 8
        assert sorted(together) == sorted(rows(step))
        assert all(len(shared[rank][number]) == 4 // ranks for rank in range(ranks))
    assert len({tuple(sorted(rows(step))) for step in alone}) == len(alone)
    assert all(torch.equal(tokens[:, 1:], targets[:, :-1]) for step in alone for tokens, targets in step)
    assert not any(torch.equal(tokens, targets) for step in alone for tokens, targets in step)


def test_resume_continues_exactly(dataset: Any) -> None:
    whole = steps_of(dataset, 1, 2)
    resumed = steps_of(dataset, 1, 2, consumed=16)
    assert [rows(step) for step in resumed[:4]] == [rows(step) for step in whole[2:]]


def test_consumed_samples_count_what_was_handed_out(dataset: Any) -> None:
    batches = TrainingBatches(
        dataset, micro_batch_size=4, global_batch_size=8, data_parallel_rank=0, data_parallel_size=1
    )
    iterator = iter(batches)
    assert batches.consumed_samples == 0
    second = [next(iterator), next(iterator)][1]
    assert batches.consumed_samples == 16
    iterator.close()  # type: ignore[attr-defined]
    third = next(iter(batches))
    assert batches.consumed_samples == 24 and rows(second) != rows(third)
    assert rows(third) == rows(steps_of(dataset, 0, 1)[2])


def test_batches_end_with_the_samples(dataset: Any) -> None:
    steps = list(
        TrainingBatches(dataset, micro_batch_size=8, global_batch_size=8, data_parallel_rank=0, data_parallel_size=1)
    )
    assert len(steps) == len(dataset) // 8


@pytest.mark.parametrize(("rank", "ranks"), [(0, 3), (2, 2)])
def test_impossible_sharing_is_refused(dataset: Any, rank: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="does not divide|is not one of"):
        TrainingBatches(
            dataset, micro_batch_size=2, global_batch_size=8, data_parallel_rank=rank, data_parallel_size=ranks
        )


def _rows_on_rank(rank: int, world_size: int, recipe: Recipe) -> list[list[tuple[int, ...]]]:
    dataset = training_dataset(PreparedData.open(recipe), recipe)
    return [rows(step) for step in steps_of(dataset, rank, world_size)]


def test_distributed_build(dataset: Any, recipe: Recipe, prepared: PreparedData) -> None:
    other_seed = dataclasses.replace(recipe, seed=77)
    first, second = run_ranks(_rows_on_rank, 2, other_seed)
    alone = steps_of(training_dataset(prepared, other_seed), 0, 1)
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(rows(step)) for step in alone]
    assert rows(alone[0]) != rows(steps_of(dataset, 0, 1)[0])


def _refusal_on_rank(rank: int, world_size: int, recipe: Recipe) -> tuple[str, bool]:
    with pytest.raises(UserError) as caught:
        training_dataset(PreparedData.open(recipe), recipe)
    return str(caught.value), caught.value.on_all_ranks


def test_all_ranks_hear_that_the_index_cannot_be_written(tmp_path: Path, recipe: Recipe) -> None:
    shutil.copytree(recipe.data.folder, tmp_path / "data", ignore=shutil.ignore_patterns("index_cache"))
    (tmp_path / "data" / "index_cache").write_text("no folder")
    moved = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, folder=str(tmp_path / "data")))
    for message, on_all_ranks in [*run_ranks(_refusal_on_rank, 2, moved), _refusal_on_rank(0, 1, moved)]:
        assert f"index of data.folder {tmp_path / 'data'} cannot be written" in message and on_all_ranks


@pytest.mark.parametrize("ranks", [1, 2])
def test_read_only_data_are_indexed_beside_the_run(
    tmp_path: Path, recipe: Recipe, dataset: Any, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    data = tmp_path / "data"
    shutil.copytree(recipe.data.folder, data, ignore=shutil.ignore_patterns("index_cache"))
    other = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, folder=str(data)), output_root=str(tmp_path / "runs")
    )
    Path(other.run_folder).mkdir(parents=True)
    mkdir = Path.mkdir

    def refused_in_data(path: Path, *arguments: Any, **options: Any) -> None:
        if path.is_relative_to(data):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refused_in_data)
    for _ in range(2):  # the second time it is there
        found = run_ranks(_rows_on_rank, ranks, other)
        together = [sorted(row for rank in found for row in rank[step]) for step in range(len(found[0]))]
        assert together == [sorted(rows(step)) for step in steps_of(dataset, 0, 1)]
    assert len(list((Path(other.run_folder) / "index_cache").glob("*/*shuffle_index.npy"))) == 1
    Path(other.run_folder, "index_cache").rename(tmp_path / "gone")
    Path(other.run_folder).rmdir()
    for message, on_all_ranks in run_ranks(_refusal_on_rank, ranks, other):
        assert f"{other.run_folder}, as data.folder {data} is read-only, cannot be written" in message and on_all_ranks


def test_unfinished_index_is_built_again(recipe: Recipe, prepared: PreparedData, dataset: Any) -> None:
    other = dataclasses.replace(recipe, seed=78)
    folder = prepared.folder / "index_cache"
    before = set(folder.iterdir())
    expected = rows(steps_of(training_dataset(prepared, other), 0, 1)[0])
    (cache,) = set(folder.iterdir()) - before
    building = cache.with_name(cache.name + ".building")
    cache.rename(building)
    damaged = next(building.glob("*shuffle_index.npy"))
    damaged.unlink()
    damaged.write_bytes(b"")
    assert rows(steps_of(training_dataset(prepared, other), 0, 1)[0]) == expected
    assert cache.is_dir() and not building.exists()


def test_two_runs_that_index_at_once_without_locks(
    recipe: Recipe, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is done first."""
    other, replace = dataclasses.replace(recipe, seed=79), os.replace

    def too_late(building: Path, cache: Path) -> None:
        shutil.copytree(building, cache)
        replace(building, cache)

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(os, "replace", too_late)
    dataset = training_dataset(prepared, other)
    monkeypatch.undo()
    assert rows(steps_of(dataset, 0, 1)[0]) == rows(steps_of(training_dataset(prepared, other), 0, 1)[0])
    assert not list((prepared.folder / "index_cache").glob("*.building"))


def test_too_little_data_for_one_sequence(recipe: Recipe, prepared: PreparedData) -> None:
    long = dataclasses.replace(recipe, model=ModelRecipe(sequence_length=prepared.train_tokens))
    with pytest.raises(UserError, match=f"has {prepared.train_tokens} tokens, one sequence needs"):
        training_dataset(prepared, long)
    fits = dataclasses.replace(recipe, model=ModelRecipe(sequence_length=prepared.train_tokens - 1))
    assert len(training_dataset(prepared, fits)[0]["tokens"]) == prepared.train_tokens - 1


def test_steps_per_epoch(recipe: Recipe, prepared: PreparedData) -> None:
    assert steps_per_epoch(prepared, recipe) == int(np.ceil(prepared.train_tokens / (8 * 16)))
    huge = dataclasses.replace(recipe, model=ModelRecipe(sequence_length=10**9))
    assert steps_per_epoch(prepared, huge) == 1
