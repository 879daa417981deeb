"""A run's engine as what evaluation measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist

from pretrain.data.windows import split_tokens
from pretrain.evaluation.subject import Embedding, Subject
from pretrain.training.engine import whole_input_embedding, whole_output_embedding
from pretrain.training.setup import Run


class RunModel:
    """On all layouts; the caller puts the engine into eval mode."""

    def __init__(self, run: Run) -> None:
        self.device = run.topology.device
        self._engine, self._shard = run.engine, run.shard
        self._tied, self._world_size = run.recipe.model.tied, run.topology.world_size

    def token_losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        losses, predictions = self._engine(tokens, targets, per_token=True)
        return losses, predictions

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._engine(tokens)
        return logits

    def agree(self, chosen: torch.Tensor) -> torch.Tensor:
        if self._world_size > 1:
            dist.broadcast(chosen, src=0)
        return chosen

    @contextmanager
    def output_embedding(self) -> Iterator[Embedding]:
        with whole_output_embedding(self._engine) as weight:
            yield Embedding(weight, self._shard)

    def input_embedding(self) -> AbstractContextManager[Embedding] | None:
        return None if self._tied else self._input_embedding()

    @contextmanager
    def _input_embedding(self) -> Iterator[Embedding]:
        with whole_input_embedding(self._engine) as weight:
            yield Embedding(weight, self._shard)


def subject_of_run(run: Run, split: str, *, show: bool = False) -> Subject:
    """The run's model on a split of its data."""
    prepared, topology = run.prepared, run.topology
    return Subject(
        model=RunModel(run),
        codec=prepared.tokenizer,
        text=split_tokens(prepared, split),
        text_bytes=prepared.manifest.splits[split].text_bytes,
        token_counts=torch.from_numpy(prepared.token_counts),
        window=run.recipe.model.sequence_length,
        micro_batch_size=run.recipe.batch.micro_batch_size,
        data_parallel_rank=topology.data_parallel_rank,
        data_parallel_size=topology.data_parallel_size,
        data_parallel_group=topology.data_parallel_group,
        show=show and topology.is_first,
    )
