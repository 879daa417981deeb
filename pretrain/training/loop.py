"""The training loop: :func:`train` builds, :func:`train_step` is one optimizer step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpointing.checkpoint import Progress, load_checkpoint, save_checkpoint
from pretrain.checkpointing.folder import latest_checkpoint
from pretrain.console import bar, say
from pretrain.data.loader import MicroBatch, TrainingBatches, training_dataset
from pretrain.errors import NonFiniteError
from pretrain.evaluation.geometry import measure_geometry
from pretrain.files import write_json
from pretrain.model.size import model_size, peak_flops, training_flops_per_token
from pretrain.recipe import Recipe
from pretrain.run_folder import RunFolder
from pretrain.topology import Topology
from pretrain.training.engine import apply_update, whole_output_embedding
from pretrain.training.metrics import MetricsWriter
from pretrain.training.schedule import learning_rate
from pretrain.training.setup import Run, build_run
from pretrain.training.validation import measure_perplexity


def train(recipe: Recipe, topology: Topology, stop_at_step: int | None = None) -> Progress:
    """Train to the end of the recipe, or to ``stop_at_step``; goes on from the latest checkpoint if there is one.

    The run folder must have been claimed (:meth:`RunFolder.claim`).
    """
    folder = RunFolder(recipe.run_folder)
    checkpoint = latest_checkpoint(folder.checkpoints)
    run = build_run(recipe, topology, init=checkpoint is None)
    if checkpoint is not None:
        run.progress = load_checkpoint(
            run.engine, checkpoint, run.objective.load_state_dict, topology, run.identity, recipe.seed
        )
    dataset = training_dataset(run.prepared, recipe)
    batches = TrainingBatches(
        dataset,
        micro_batch_size=recipe.batch.micro_batch_size,
        global_batch_size=recipe.batch.global_batch_size,
        data_parallel_rank=topology.data_parallel_rank,
        data_parallel_size=topology.data_parallel_size,
        consumed_samples=run.progress.consumed_samples,
    )
    writer = None
    if topology.is_first:
        write_json(folder.deepspeed_file, run.deepspeed_config)
        board = folder.path / "tensorboard" if recipe.reporting.tensorboard else None
        writer = MetricsWriter(folder.metrics_file, run.progress.step, board)
        _announce(run, checkpoint is not None)
    last = min(stop_at_step or recipe.batch.train_steps, recipe.batch.train_steps)
    try:
        _run_steps(run, batches, writer, folder, last)
    finally:
        if writer is not None:
            writer.close()
    return run.progress


def _run_steps(run: Run, batches: TrainingBatches, writer: MetricsWriter | None, folder: RunFolder, last: int) -> None:
    recipe, topology = run.recipe, run.topology
    clock = _Clock(run)
    steps = iter(batches)
    saved = run.progress.step
    with bar(last, "training", "step", show=topology.is_first, initial=run.progress.step) as progress_bar:
        while run.progress.step < last:
            micro_batches = [
                (tokens.to(topology.device), targets.to(topology.device)) for tokens, targets in next(steps)
            ]
            done = train_step(run, micro_batches)
            step = run.progress.step
            clock.count(done.tokens)
            progress_bar.update()
            if _due(step, recipe.reporting.log_every_steps, last) or _measures_due(recipe, step, last):
                record: dict[str, Any] = {"step": step, "tokens": run.progress.consumed_tokens, "loss": done.loss}
                record |= {"learning_rate": done.learning_rate, "grad_norm": done.grad_norm}
                record |= clock.rates()
                record |= _measures(run, step, last)
                clock.restart()
                if writer is not None:
                    writer.write(record)
                progress_bar.set_postfix_str(f"loss {done.loss:.3f}, {record['tokens_per_second']:,.0f} tokens/s")
            if _due(step, recipe.checkpoint.every_steps, last):
                save(run, folder)
                saved = step
                clock.restart()
    if saved < run.progress.step:
        save(run, folder)


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per token, mean over the global batch
    tokens: int  # valid targets of the global batch
    learning_rate: float
    grad_norm: float  # global, before clipping


def train_step(run: Run, micro_batches: list[MicroBatch]) -> StepResult:
    """One optimizer step over this rank's micro-batches, each tokens and targets int64 [B, S].

    Raises:
        NonFiniteError: on all ranks; nothing was updated.
    """
    engine, topology, step = run.engine, run.topology, run.progress.step
    all_targets = torch.stack([targets for _, targets in micro_batches])
    run.objective.begin_step(all_targets)
    valid = (all_targets != -100).sum()
    dist.all_reduce(valid, group=topology.data_parallel_group)
    # DeepSpeed averages gradients over data-parallel ranks; what is wanted is their sum over all valid targets.
    scale = topology.data_parallel_size / valid.clamp(min=1)

    loss_sum = torch.zeros((), device=topology.device)
    for index, (tokens, targets) in enumerate(micro_batches):
        loss = engine(tokens, targets)
        engine.backward(loss * scale, scale_wrt_gas=False)
        loss_sum += loss.detach()
        if index + 1 < len(micro_batches):
            engine.step()  # accumulates: not at the boundary yet

    dist.all_reduce(loss_sum, group=topology.data_parallel_group)
    mean_loss, rate = float(loss_sum / valid.clamp(min=1)), learning_rate(run.recipe, step)
    try:
        if not math.isfinite(mean_loss):
            raise NonFiniteError(f"the loss is {mean_loss}")
        norm = apply_update(engine, rate)
    except NonFiniteError as error:
        raise NonFiniteError(
            f"step {step + 1}: {error}. Nothing was updated, and checkpoints saved before are good. "
            "A lower learning rate, gradient clipping or fp32 are the usual ways out"
        ) from error
    run.progress = Progress(
        step + 1,
        run.progress.consumed_samples + run.recipe.batch.global_batch_size,
        run.progress.consumed_tokens + int(valid),
    )
    return StepResult(mean_loss, int(valid), rate, norm)


def save(run: Run, folder: RunFolder) -> None:
    """Write a checkpoint of all ranks."""
    save_checkpoint(
        run.engine,
        folder.checkpoints,
        run.progress,
        run.objective.state_dict(),
        run.topology,
        run.identity,
        run.recipe.checkpoint.keep_last,
    )


def _due(step: int, every: int, last: int) -> bool:
    """Every so many steps and at the end; never if 0."""
    return every > 0 and (step % every == 0 or step == last)


def _measures_due(recipe: Recipe, step: int, last: int) -> bool:
    reporting = recipe.reporting
    return _due(step, reporting.geometry_every_steps, last) or _due(step, reporting.validate_every_steps, last)


def _measures(run: Run, step: int, last: int) -> dict[str, Any]:
    """What is measured at this step besides the loss; collectives, the same on all ranks."""
    reporting, record = run.recipe.reporting, dict[str, Any]()
    rare_fraction = run.objective.rare_fraction()
    if rare_fraction is not None:
        record["rare_fraction"] = rare_fraction
    if _due(step, reporting.geometry_every_steps, last):
        with whole_output_embedding(run.engine) as weight:
            geometry = measure_geometry(weight, run.shard)
        for name in ("isotropy", "isotropy_unit_norm", "mean_cosine", "mean_shift"):
            record[name] = getattr(geometry, name)
    if _due(step, reporting.validate_every_steps, last):
        grouped = measure_perplexity(
            run.engine, run.prepared, run.recipe, run.topology, "valid", reporting.validation_sequences
        )
        perplexity = grouped.perplexity()
        record["validation_perplexity"] = perplexity
        record["validation_loss"] = math.log(perplexity["total"]) if perplexity["total"] else None
    return record


class _Clock:
    """Tokens per second and seconds per step since the last record."""

    def __init__(self, run: Run) -> None:
        self._world_size = run.topology.world_size
        self._flops_per_token = training_flops_per_token(run.recipe.model, run.prepared.vocab_size)
        device = run.topology.device
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.restart()

    def restart(self) -> None:
        self._begin, self._steps, self._tokens = time.perf_counter(), 0, 0

    def count(self, tokens: int) -> None:
        self._steps += 1
        self._tokens += tokens

    def rates(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._begin
        rate = self._tokens / seconds
        rates = {"tokens_per_second": rate, "step_seconds": seconds / self._steps}
        if self._peak is not None:
            rates["mfu"] = rate * self._flops_per_token / (self._peak * self._world_size)
        return rates


def _announce(run: Run, resumed: bool) -> None:
    recipe = run.recipe
    size = model_size(recipe.model, run.prepared.vocab_size)
    say(
        f"{recipe.name}: {recipe.objective.method}, {recipe.model.style} with {size.total:,} parameters "
        f"({size.without_embeddings:,} without embeddings), vocabulary {run.prepared.vocab_size:,}"
    )
    say(
        f"{run.topology.describe()}, ZeRO {run.engine.zero_optimization_stage()}, {recipe.precision}; "
        f"{recipe.tokens_per_step:,} tokens a step, {recipe.batch.train_steps:,} steps"
    )
    if resumed:
        say(f"goes on from step {run.progress.step:,} ({run.progress.consumed_tokens:,} tokens)")
    elif recipe.model.init_from:
        say(f"starts with the weights of {recipe.model.init_from}")
