"""The training loop: :func:`train` builds, :func:`train_step` is one optimizer step."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from pretrain.checkpointing.checkpoint import Progress, resume
from pretrain.checkpointing.folder import checkpoints_in, remove_unfinished
from pretrain.checkpointing.trained_on import trained_on
from pretrain.cluster.incarnation import watch_fence
from pretrain.cluster.preflight import preflight
from pretrain.console import bar, say
from pretrain.data.loader import MicroBatch, TrainingBatches, training_dataset
from pretrain.files import write_json
from pretrain.model.size import model_size, peak_flops, training_flops_per_token
from pretrain.recipe import Recipe
from pretrain.run_folder import RunFolder
from pretrain.topology import Topology
from pretrain.training.engine import apply_update
from pretrain.training.measures import Measures, due
from pretrain.training.metrics import MetricsWriter
from pretrain.training.schedule import learning_rate
from pretrain.training.setup import Run, build_run
from pretrain.training.spikes import Spike, after_skipping, after_training, find_spike, pass_over, stop_for
from pretrain.training.stopping import Stop, StopSignals
from pretrain.training.watchdog import PATIENCE, Watchdog


def train(
    recipe: Recipe,
    topology: Topology,
    stop_at_step: int | None = None,
    signals: StopSignals | None = None,
    allow_changes: bool = False,
) -> Progress:
    """Train to the end of the recipe, to ``stop_at_step``, or until all ranks are asked to stop; then save.

    Goes on from the newest checkpoint that verifies, if there are any. The run folder must have been claimed
    (:meth:`RunFolder.claim`).

    Raises:
        SpikeError: on all ranks, at a step that must not be trained on; nothing was updated.
    """
    folder = RunFolder(recipe.run_folder)
    if topology.local_rank == 0:
        watch_fence(folder.path)
    stop = Stop(signals or StopSignals(), folder.stop_file, topology)
    stacks = folder.stacks / f"rank_{topology.rank:05d}.txt"
    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(60 * recipe.hang_timeout_minutes, topology.rank, stacks))
        watchdog.expect("the start", PATIENCE)
        preflight(recipe, topology, folder)
        run = build_run(recipe, topology, init=not checkpoints_in(folder.checkpoints))
        run.allows_changes = allow_changes
        stack.callback(run.saver.wait)
        if topology.is_first:
            remove_unfinished(folder.checkpoints)
        resumed = load_newest(run, folder)
        run.progress = resumed or run.progress
        to_come = max(0, recipe.batch.train_steps - run.progress.step) * recipe.batch.global_batch_size
        batches = TrainingBatches(
            training_dataset(run.prepared, recipe, run.progress.consumed_samples + to_come),
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
            stack.callback(writer.close)
            _announce(run, resumed is not None)
        last = min(stop_at_step or recipe.batch.train_steps, recipe.batch.train_steps)
        if not stop.wanted():
            _run_steps(run, batches, writer, folder, last, stop, watchdog)
    run.engine.destroy()  # else its hooks keep it, and its groups with their threads, as long as the process lives
    return run.progress


def _run_steps(
    run: Run,
    batches: TrainingBatches,
    writer: MetricsWriter | None,
    folder: RunFolder,
    last: int,
    stop: Stop,
    watchdog: Watchdog,
) -> None:
    recipe, topology = run.recipe, run.topology
    clock, steps, measures = _Clock(run), iter(batches), Measures(run)
    saved, rollbacks, stopping, patience = run.progress.step, 0, False, PATIENCE
    with bar(last, "training", "step", show=topology.is_first, initial=run.progress.step) as progress_bar:
        while run.progress.step < last and not stopping:
            watchdog.expect(f"step {run.progress.step + 1}", patience)
            micro_batches = [
                (tokens.to(topology.device), targets.to(topology.device)) for tokens, targets in next(steps)
            ]
            measures.begin_step(run.progress.step + 1, last)
            done = train_step(run, micro_batches, stop.wanted_here())
            step, stopping, patience = run.progress.step, done.stop, 1.0
            clock.count(0 if done.spike else done.tokens)
            progress_bar.update()
            measured, saving = measures.due(step, last), due(step, recipe.checkpoint.every_steps, last)
            if measured or saving:
                watchdog.expect(f"measuring and saving at step {step}", PATIENCE)
            if done.spike is not None and done.spike.action == "rollback":
                watchdog.expect(f"going back from step {step}", PATIENCE)
                rollbacks += 1
                done = replace(done, back_to_step=_roll_back(run, done.spike, folder, writer, rollbacks))
            if measured or done.spike is not None or due(step, recipe.reporting.log_every_steps, last):
                record: dict[str, Any] = {"step": step, "tokens": run.progress.consumed_tokens}
                record |= done.record() | clock.rates() | run.saver.seconds()
                record |= measures.record(step, last, trained=done.spike is None)
                if writer is not None:
                    writer.write(record)
                progress_bar.set_postfix_str(
                    f"loss {done.loss:.3f}, {record['tokens_per_second']:,.0f} tokens/s", refresh=False
                )
                clock.restart()
            if saving:
                save(run, folder)
                saved, rollbacks = step, rollbacks if done.spike is not None else 0
                clock.restart()
            if measured or saving:
                stopping = stopping or stop.wanted()
    if saved < run.progress.step:
        watchdog.expect(f"saving at step {run.progress.step}", PATIENCE)
        save(run, folder)


@dataclass(frozen=True)
class StepResult:
    loss: float  # nats per token, mean over the global batch
    tokens: int  # valid targets of the global batch
    learning_rate: float
    grad_norm: float  # global, before clipping
    spike: Spike | None = None  # why this step was not trained on
    back_to_step: int | None = None  # of the checkpoint that was loaded again for it
    stop: bool = False  # some rank was asked to stop

    def record(self) -> dict[str, Any]:
        """What the metrics say about this step."""
        if self.spike is not None:
            skipped = {"reason": self.spike.reason, "loss": self.loss, "grad_norm": self.grad_norm}
            return {"skipped": skipped | ({} if self.back_to_step is None else {"back_to_step": self.back_to_step})}
        return {"loss": self.loss, "learning_rate": self.learning_rate, "grad_norm": self.grad_norm}


def train_step(run: Run, micro_batches: list[MicroBatch], stop_wanted: bool = False) -> StepResult:
    """One optimizer step over this rank's micro-batches, each tokens and targets int64 [B, S].

    Args:
        stop_wanted: this rank was asked to stop; the result tells it to all.

    Raises:
        SpikeError: on all ranks; nothing was updated.
    """
    engine, topology, progress = run.engine, run.topology, run.progress
    all_targets = torch.stack([targets for _, targets in micro_batches])
    run.objective.begin_step(all_targets, progress.step + 1)
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

    # Over all ranks, so that all decide the same; the tensor-parallel ranks of one replica have the same loss.
    shared = torch.stack([loss_sum / topology.tensor_parallel_size, torch.full_like(loss_sum, float(stop_wanted))])
    dist.all_reduce(shared)
    mean_loss, stops = (shared / torch.stack([valid.clamp(min=1), torch.ones_like(valid)])).tolist()
    rate, spikes = learning_rate(run.recipe, progress.step), run.recipe.spikes
    norm, spike = apply_update(engine, rate, partial(find_spike, spikes, progress, mean_loss))
    samples = run.recipe.batch.global_batch_size
    if spike is None:
        run.progress = after_training(spikes, progress, samples, int(valid), (mean_loss, norm))
    else:
        run.objective.undo_step()
        run.progress = pass_over(spikes, progress, spike, samples)
    return StepResult(mean_loss, int(valid), rate, norm, spike, stop=stops > 0)


def _roll_back(run: Run, spike: Spike, folder: RunFolder, writer: MetricsWriter | None, times: int) -> int:
    """Back to the last checkpoint, and past every batch since; a collective.

    Returns:
        The step of that checkpoint.

    Raises:
        SpikeError: there is no checkpoint, or the run went back too many times since a trained step was saved.
    """
    seen = run.progress
    if times > run.recipe.spikes.max_in_a_row:
        raise stop_for(spike, seen.step, f", after {times - 1} rollbacks in a row (spikes.max_in_a_row)")
    run.saver.wait()
    saved = load_newest(run, folder)
    if saved is None:
        raise stop_for(spike, seen.step, ", and there is no checkpoint to go back to (checkpoint.every_steps)")
    run.progress = after_skipping(saved, seen.step - saved.step, seen.consumed_samples - saved.consumed_samples)
    if writer is not None:
        writer.go_back(saved.step)
    return saved.step


def save(run: Run, folder: RunFolder) -> None:
    """Write a checkpoint of all ranks; where it is written in the background, ``run.saver.wait()`` sees it done."""
    place = trained_on(run.recipe, run.topology)
    run.saver.save(folder.checkpoints, run.progress, run.objective.state_dict(), run.identity, place)


def load_newest(run: Run, folder: RunFolder) -> Progress | None:
    """Put all ranks where they were at the newest checkpoint that verifies; None if nothing was saved yet."""
    return resume(
        run.engine,
        folder.checkpoints,
        run.objective.load_state_dict,
        run.topology,
        run.identity,
        run.recipe.seed,
        allow_changes=run.allows_changes,
    )


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
