"""From shards to batches for training: megatron-core's shuffled samples.

Letters: L sequence length, B micro-batch size (sequences), G global batch size (sequences).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pretrain.cluster.job import node_name
from pretrain.data.prepared import PreparedData, check_length
from pretrain.errors import UserError
from pretrain.files import folder_lock
from pretrain.recipe import Recipe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

MicroBatch = tuple[torch.Tensor, torch.Tensor]


def training_dataset(prepared: PreparedData, recipe: Recipe, samples: int | None = None) -> Any:
    """Shuffled samples of the train split, at least ``samples`` of them.

    ``dataset[i]`` holds ``tokens`` and ``labels``, both int64 [L]. The order depends on the seed, the sequence length
    and the number of samples, if that is more than one epoch. All ranks must call it: rank 0 writes the index to the
    data folder, or to the run's where data are read-only, and the others wait.

    Args:
        samples: None: ``train_steps * global_batch_size``. A run that goes on with another batch needs another number.

    Raises:
        UserError: the split is shorter than one sequence, or the index cannot be written.
    """
    check_length(prepared, recipe)
    if samples is None:
        samples = recipe.batch.train_steps * recipe.batch.global_batch_size
    found: list[Path | UserError | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = [_index(prepared, recipe, samples)]
        except UserError as error:
            error.on_all_ranks = True
            found = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    assert found[0] is not None, "the first rank says where it is"
    config = _config(prepared, recipe, found[0])
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
    train, _, _ = builder.build()
    return train


class TrainingBatches:
    """This data-parallel rank's micro-batches, one list per optimizer step.

    Step ``s`` is the samples ``[s * G, (s + 1) * G)``, however many ranks share them: micro-batch ``m`` of rank ``r``
    of ``R`` starts at ``s * G + (m * R + r) * B``. Iterating again goes on after the last step handed out.

    Args:
        dataset: from :func:`training_dataset`.
        consumed_samples: where to begin, in samples of all ranks; a resumed run gives what was saved.

    Raises:
        ValueError: the global batch does not divide into micro-batches, or the rank is not one of the ranks.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
    ) -> None:
        if global_batch_size % (micro_batch_size * data_parallel_size):
            per_pass = f"{micro_batch_size} x {data_parallel_size}"
            raise ValueError(f"a global batch of {global_batch_size} sequences does not divide by {per_pass}")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data-parallel rank {data_parallel_rank} is not one of {data_parallel_size}")
        self._dataset = dataset
        self._micro_batch_size, self._global_batch_size = micro_batch_size, global_batch_size
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._consumed_samples = consumed_samples

    @property
    def consumed_samples(self) -> int:
        """Samples of all ranks in the steps handed out so far, those before a resume included."""
        return self._consumed_samples

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Yield ``[(tokens, targets), ...]``, each int64 [B, L], until the samples end; the next step is read ahead."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
            start, size = self._consumed_samples, self._global_batch_size
            ahead = reader.submit(self._step, start) if start + size <= len(self._dataset) else None
            while ahead is not None:
                batch = ahead.result()
                start += size
                ahead = reader.submit(self._step, start) if start + size <= len(self._dataset) else None
                self._consumed_samples = start
                yield batch

    def _step(self, start: int) -> list[MicroBatch]:
        size, ranks = self._micro_batch_size, self._ranks
        firsts = range(start + self._rank * size, start + self._global_batch_size, ranks * size)
        return [self._micro_batch(first) for first in firsts]

    def _micro_batch(self, first: int) -> MicroBatch:
        samples = [self._dataset[index] for index in range(first, first + self._micro_batch_size)]
        return torch.stack([entry["tokens"] for entry in samples]), torch.stack([entry["labels"] for entry in samples])


@dataclass(frozen=True)
class _DatasetTokenizer:
    """What GPTDataset asks of a tokenizer. Its pad id is one no text has: GPTDataset rewrites that id to 0."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, str]
    pad: int = -1


def _config(prepared: PreparedData, recipe: Recipe, cache: Path) -> Any:
    tokenizer = _DatasetTokenizer(
        prepared.vocab_size, prepared.tokenizer.eos_id, {"sha256": prepared.manifest.tokenizer_sha256}
    )
    return GPTDatasetConfig(
        random_seed=recipe.seed,
        sequence_length=recipe.model.sequence_length,
        blend_per_split=[([prepared.prefix("train")], None), None, None],
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )


def _cache_key(prepared: PreparedData, length: int, seed: int, samples: int) -> str:
    return hashlib.sha256(f"{prepared.sha256} {prepared.folder} {length} {seed} {samples}".encode()).hexdigest()[:24]


def _index(prepared: PreparedData, recipe: Recipe, samples: int) -> Path:
    """Where the index of the samples is, written if need be."""
    name = _cache_key(prepared, recipe.model.sequence_length, recipe.seed, samples)
    caches = [folder / "index_cache" / name for folder in (prepared.folder, Path(recipe.run_folder))]
    for cache in caches:
        if cache.is_dir():
            return cache
    try:
        return _write_index(prepared, caches[0], recipe, samples)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise _not_written(f"data.folder {prepared.folder}", error) from error
    try:
        return _write_index(prepared, caches[1], recipe, samples)
    except OSError as error:
        raise _not_written(f"{recipe.run_folder}, as data.folder {prepared.folder} is read-only,", error) from error


def _write_index(prepared: PreparedData, cache: Path, recipe: Recipe, samples: int) -> Path:
    """Make ``cache`` whole or not at all; several runs may share the data folder, and a run may die here."""
    cache.parent.mkdir(exist_ok=True)
    with folder_lock(cache.parent, "indexing", wait=True) as held:
        if cache.is_dir():
            return cache
        # Without a lock another run may build the same.
        building = cache.with_name(f"{cache.name}{'' if held else f'.{node_name()}.{os.getpid()}'}.building")
        shutil.rmtree(building, ignore_errors=True)
        low_level = IndexedDataset(prepared.prefix("train"))
        indices = np.arange(len(low_level), dtype=np.int32)
        config = _config(prepared, recipe, building)
        GPTDataset(low_level, prepared.prefix("train"), indices, samples, Split.train, config)
        try:
            os.replace(building, cache)
        except OSError:
            if held or not cache.is_dir():
                raise
            shutil.rmtree(building)  # the other one was faster
    return cache


def _not_written(where: str, error: OSError) -> UserError:
    return UserError(f"the sample index of {where} cannot be written: {error}; make the folder writable")
