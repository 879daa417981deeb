"""What is measured at some steps besides the loss: the embedding's shape, what the gates take, validation.

Nothing here draws random numbers or changes what is trained. The names it records are told in
:mod:`pretrain.training.metrics`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from agg import LossProbe, VocabShard
from pretrain.evaluation.frequency_groups import GroupedPerplexity, frequency_deciles, frequency_groups
from pretrain.evaluation.geometry import measure_geometry, row_norms
from pretrain.evaluation.group_names import DECILES
from pretrain.evaluation.run_model import subject_of_run
from pretrain.training.embedding_rows import rows_of_rank
from pretrain.training.setup import Run


class Measures:
    """Of one run. All methods are called on all ranks alike, as some are collectives."""

    def __init__(self, run: Run) -> None:
        self._run, self._reporting = run, run.recipe.reporting
        counts, device = torch.from_numpy(run.prepared.token_counts), run.topology.device
        deciles, shard = frequency_deciles(counts).long(), run.shard
        self._groups = frequency_groups(counts).to(device)
        self._rows_by_decile = deciles.bincount(minlength=len(DECILES)).to(device)
        self._deciles = deciles[shard.start : shard.start + shard.real].to(device)  # of this rank's rows
        self._seen = torch.zeros(len(shard), dtype=torch.bool, device=device)
        self._seen[: shard.real] = self._deciles != DECILES.index("never_seen")

    def due(self, step: int, last: int) -> bool:
        """Whether anything takes longer at this step than the loss."""
        return self._geometry_due(step, last) or due(step, self._reporting.validate_every_steps, last)

    def begin_step(self, step: int, last: int) -> None:
        """Before the step is trained on: have its loss calls watched, if it is one to measure."""
        self._run.objective.probe = LossProbe(self._run.topology.device) if self._geometry_due(step, last) else None

    def record(self, step: int, last: int, *, trained: bool) -> dict[str, Any]:
        """After it; ``trained`` is False where nothing was learnt from it."""
        record = dict[str, Any]()
        rare_fraction = self._run.objective.rare_fraction() if trained else None
        if rare_fraction is not None:
            record["rare_fraction"] = rare_fraction
        if self._geometry_due(step, last):
            record |= self._embedding()
            if trained:
                record |= self._gradient()
        if due(step, self._reporting.validate_every_steps, last):
            record |= self._validation()
        return record

    def _geometry_due(self, step: int, last: int) -> bool:
        return due(step, self._reporting.geometry_every_steps, last)

    def _embedding(self) -> dict[str, Any]:
        """The output embedding's shape, of all rows and of those whose ids occur, and its norms."""
        with rows_of_rank(self._run.engine, self._run.shard) as (weight, rows):
            record: dict[str, Any] = dataclasses.asdict(measure_geometry(weight, rows))
            if self._rows_by_decile[-1]:
                seen = self._seen[self._places(rows)]
                record["seen_rows"] = dataclasses.asdict(measure_geometry(weight, rows, seen))
            record["row_norm_by_decile"] = self._mean_by_decile(row_norms(weight), rows)
        return record

    def _places(self, rows: VocabShard) -> slice:
        """Of some rows of this rank's shard, within it."""
        return slice(rows.start - self._run.shard.start, rows.stop - self._run.shard.start)

    def _gradient(self) -> dict[str, Any]:
        """Of the step's own loss calls: the loss by group, and what gates let through."""
        objective, topology = self._run.objective, self._run.topology
        probe, gates = objective.probe, objective.gates()
        if probe is None:
            return {}
        losses = GroupedPerplexity(self._groups)
        for targets, token_losses in probe.token_losses:
            losses.update(token_losses, targets)
        record: dict[str, Any] = {"loss_by_group": losses.reduce(topology.data_parallel_group).mean_loss()}
        if gates is not None:
            share = probe.gated_share(self._run.shard, topology.data_parallel_group)
            record["gated_share"] = None if share is None else dataclasses.asdict(share)
            record["g1_by_decile"] = self._mean_by_decile(gates.g1, self._run.shard)
            record["g2_by_decile"] = self._mean_by_decile(gates.g2, self._run.shard)
        return record

    def _mean_by_decile(self, values: torch.Tensor, rows: VocabShard) -> dict[str, float | None]:
        """Mean over each decile of ``values`` [n], one each of ``rows``, with one reduction of as many numbers."""
        sums = torch.zeros(len(DECILES), dtype=torch.float64, device=values.device)
        sums.index_add_(0, self._deciles[self._places(rows)], values[: rows.real].double())
        means = (rows.all_reduce(sums) / self._rows_by_decile).tolist()
        return {name: None if math.isnan(mean) else mean for name, mean in zip(DECILES, means, strict=True)}

    def _validation(self) -> dict[str, Any]:
        engine, limit = self._run.engine, self._reporting.validation_sequences
        was_training = engine.module.training
        engine.eval()
        grouped = subject_of_run(self._run, "valid").perplexity(limit=limit)
        engine.train(was_training)
        return {"validation_perplexity": grouped.perplexity(), "validation_loss": grouped.mean_loss()["total"]}


def due(step: int, every: int, last: int) -> bool:
    """Every so many steps and at the end; never if 0."""
    return every > 0 and (step % every == 0 or step == last)
