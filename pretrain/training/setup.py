"""Everything a rank needs to train or evaluate a run, built in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import deepspeed

from agg import VocabShard
from agg.vocab_shard import padded_vocab_size
from pretrain.checkpointing.checkpoint import Progress
from pretrain.checkpointing.huggingface.initial_weights import load_initial_weights
from pretrain.checkpointing.identity import identity_of
from pretrain.checkpointing.saving import CheckpointSaver
from pretrain.data.prepared import PreparedData, steps_per_epoch
from pretrain.model.gpt import build_model
from pretrain.randomness import seed_everything
from pretrain.recipe import Recipe
from pretrain.topology import Topology
from pretrain.training.deepspeed_config import deepspeed_config
from pretrain.training.engine import build_engine
from pretrain.training.objective import PlainObjective, build_objective
from pretrain.training.rare_rows import ever_frozen
from pretrain.training.row_updates import RowUpdates


@dataclass
class Run:
    """One rank's parts of a run, and how far it is."""

    recipe: Recipe
    topology: Topology
    prepared: PreparedData
    shard: VocabShard
    objective: PlainObjective
    engine: deepspeed.DeepSpeedEngine
    deepspeed_config: dict[str, Any]
    saver: CheckpointSaver
    progress: Progress
    allows_changes: bool = False  # of what checkpoints were trained on; see RunFolder.check

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that loads it."""
        return identity_of(self.recipe, self.prepared)


def build_run(recipe: Recipe, topology: Topology, *, init: bool = False) -> Run:
    """Data, model, objective and engine at step 0.

    Weights come from ``recipe.seed`` alone, or with ``init`` from the folder of ``recipe.model.init_from``, if it
    names one; a run that then loads a checkpoint needs no ``init``. Dropout differs between data-parallel ranks and is
    shared by the tensor-parallel ranks of one replica.
    """
    prepared = PreparedData.open(recipe)
    shard = VocabShard.of_rank(
        prepared.vocab_size,
        topology.tensor_parallel_rank,
        topology.tensor_parallel_size,
        topology.tensor_parallel_group,
        multiple_of=recipe.model.vocab_multiple_of,
    )
    model = build_model(
        recipe.model, shard, padded_vocab_size(prepared.vocab_size, recipe.model.vocab_multiple_of), recipe.seed
    )
    if init and recipe.model.init_from:
        load_initial_weights(model, recipe, prepared, shard, topology.tensor_parallel_rank)
    objective = build_objective(
        recipe.objective,
        shard,
        special_ids=prepared.tokenizer.special_ids,
        token_counts=prepared.token_counts,
        steps_per_epoch=steps_per_epoch(prepared, recipe),
        data_parallel_group=topology.data_parallel_group,
        soft_cap=recipe.model.logit_soft_cap,
    )
    model.output_head.loss = objective.loss
    config = deepspeed_config(recipe, topology.data_parallel_size)
    engine = build_engine(model, recipe.optimizer, config, topology)
    couples, centers = recipe.optimizer.couple_embeddings, recipe.objective.center_rows
    frozen_rows = objective.frozen_rows if ever_frozen(recipe.objective) else None
    if couples or centers or frozen_rows is not None:
        RowUpdates(engine, shard, topology.device, couples=couples, centers=centers, frozen_rows=frozen_rows)
    seed_everything(recipe.seed + 1_000_003 * (1 + topology.data_parallel_rank))
    saver = CheckpointSaver(engine, topology, recipe.checkpoint)
    return Run(recipe, topology, prepared, shard, objective, engine, config, saver, Progress(0, 0, 0))
