"""Layouts that fit four ranks, and runs that are saved on one of them and go on on another."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from pretrain.checkpointing.portable import PortableCheckpoint
from pretrain.recipe import Recipe
from tests.distributed import run_ranks
from tests.small_runs import change

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SAVED_AT, STEPS = 5, 8  # the window of 4 steps has slid before and slides after


@dataclass(frozen=True)
class Layout:
    tensor: int
    data: int
    stage: int

    def __str__(self) -> str:
        return f"tensor{self.tensor}-data{self.data}-zero{self.stage}"

    @property
    def world_size(self) -> int:
        return self.tensor * self.data


LAYOUTS = [
    Layout(tensor, data, stage) for stage in (0, 1, 2, 3) for tensor, data in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))
]


@dataclass
class Told:
    """What one rank saw."""

    tensor_parallel_rank: int
    losses: list[float]
    consumed: tuple[int, int, int]
    counts: tuple[int, list[int]]  # first id of the shard, appearances
    tensors: dict[str, dict[str, torch.Tensor]]  # this tensor-parallel rank's parts, by DeepSpeed's own functions


def on_layout(recipe: Recipe, layout: Layout, root: Path, **policy: Any) -> Recipe:
    """The recipe of a run in ``root/LAYOUT``."""
    recipe = change(
        recipe,
        name=str(layout),
        output_root=str(root),
        batch={"train_steps": STEPS},
        parallel={
            "tensor_model_parallel_size": layout.tensor,
            "data_parallel_size": layout.data,
            "sharding": f"zero{layout.stage}",
        },
    )
    recipe.check()
    return recipe


def save_on(recipe: Recipe, layout: Layout, root: Path) -> tuple[Path, list[Told]]:
    """Train from the beginning and save; the checkpoint, and what each rank saw."""
    told = run_ranks(_train_and_save, layout.world_size, on_layout(recipe, layout, root))
    return root / str(layout) / "checkpoints" / f"step_{SAVED_AT:08d}", told


def resume_on(recipe: Recipe, layout: Layout, root: Path, checkpoint: Path) -> tuple[Path, list[Told]]:
    """Load, save again at once, and train to the end; the second checkpoint, and what each rank saw."""
    told = run_ranks(_resume, layout.world_size, on_layout(recipe, layout, root), checkpoint)
    return root / str(layout) / "checkpoints" / checkpoint.name, told


def whole_counts(told: list[Told]) -> list[int]:
    """Appearances of every id of the padded vocabulary, which all replicas must agree on."""
    shards: dict[int, list[int]] = {}
    for rank in told:
        start, appearances = rank.counts
        assert shards.setdefault(start, appearances) == appearances
    return [count for start in sorted(shards) for count in shards[start]]


def same_tensors(one: PortableCheckpoint, other: PortableCheckpoint) -> bool:
    """Bit for bit, weights and Adam's state and step."""
    assert one.names() == other.names() and one.adam_step == other.adam_step
    return all(torch.equal(one.tensor(name, kind), other.tensor(name, kind)) for name in one.names() for kind in KINDS)


def _train_and_save(rank: int, world_size: int, recipe: Recipe) -> Told:
    from pretrain.topology import connect
    from pretrain.training.setup import build_run

    run = build_run(recipe, connect(recipe))
    losses = _advance(run, SAVED_AT)
    _save(run)
    return _tell(run, losses)


def _resume(rank: int, world_size: int, recipe: Recipe, checkpoint: Path) -> Told:
    from pretrain.checkpointing.checkpoint import load_checkpoint
    from pretrain.topology import connect
    from pretrain.training.setup import build_run

    run = build_run(recipe, connect(recipe))
    load = run.objective.load_state_dict
    run.progress = load_checkpoint(run.engine, checkpoint, load, run.topology, run.identity, recipe.seed)
    _save(run)
    told = _tell(run, [])
    told.losses = _advance(run, STEPS - SAVED_AT)
    return told


def _advance(run: Any, steps: int) -> list[float]:
    from pretrain.data.loader import TrainingBatches, training_dataset
    from pretrain.training.loop import train_step

    batches = TrainingBatches(
        training_dataset(run.prepared, run.recipe),
        micro_batch_size=run.recipe.batch.micro_batch_size,
        global_batch_size=run.recipe.batch.global_batch_size,
        data_parallel_rank=run.topology.data_parallel_rank,
        data_parallel_size=run.topology.data_parallel_size,
        consumed_samples=run.progress.consumed_samples,
    )
    return [train_step(run, batch).loss for _, batch in zip(range(steps), batches, strict=False)]


def _save(run: Any) -> None:
    from pretrain.run_folder import RunFolder
    from pretrain.training.loop import save

    save(run, RunFolder(run.recipe.run_folder))


def _tell(run: Any, losses: list[float]) -> Told:
    frequency = run.objective.module.frequency
    return Told(
        run.topology.tensor_parallel_rank,
        losses,
        dataclasses.astuple(run.progress),
        (run.shard.start, frequency.appearances.tolist()),
        _tensors_by_deepspeed(run.engine),
    )


def _tensors_by_deepspeed(engine: deepspeed.DeepSpeedEngine) -> dict[str, dict[str, torch.Tensor]]:
    """Through functions of DeepSpeed, none of ours; without ZeRO from the optimizers themselves."""
    if not engine.zero_optimization():
        masters = dict(engine.module.named_parameters())
        if engine.bfloat16_enabled():
            for low_group, high_group in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
                masters |= {engine.param_names[low]: high for low, high in zip(low_group, high_group, strict=True)}
        states = engine.basic_optimizer.state
        return {
            name: {"weight": master.detach().clone(), **{kind: states[master][kind].clone() for kind in KINDS[1:]}}
            for name, master in masters.items()
        }
    if engine.zero_optimization_stage() < 3:
        # DeepSpeed 0.19 links all states after the step of the first group, when the others have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    return {
        name: {
            "weight": safe_get_full_fp32_param(parameter).clone(),
            **{kind: safe_get_full_optimizer_state(parameter, kind).clone() for kind in KINDS[1:]},
        }
        for name, parameter in engine.module.named_parameters()
    }
