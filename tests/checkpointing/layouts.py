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


def other(source: Layout) -> Layout:
    """Another layout in every respect; each is the other of one."""
    stage, place = divmod(LAYOUTS.index(source), 5)
    return LAYOUTS[(stage + 1) % 4 * 5 + (place + 1 + stage) % 5]


def variant_from(source: Layout) -> str:
    """What is moved from there to the other layout: where there are four replicas, the model that is padded."""
    return "gpt2" if 4 in (source.data, other(source).data) else "llama"


BF16_SOURCES = [  # variant and layout, for the short form of the tests
    ("gpt2-bf16", Layout(1, 2, 0)),
    ("llama-bf16", Layout(2, 1, 1)),
    ("gpt2-bf16", Layout(1, 2, 2)),
    ("llama-bf16", Layout(2, 1, 3)),
    ("gpt2-bf16", Layout(1, 2, 1)),
    ("gpt2-bf16", Layout(1, 2, 3)),
]


@dataclass
class Told:
    """What one rank saw: losses of all its steps, the rest at ``SAVED_AT``."""

    tensor_parallel_rank: int
    seed: int
    losses: list[float]
    progress: tuple[int, int, int]
    counts: tuple[int, list[int]]  # first id of the shard, appearances
    tensors: dict[str, dict[str, torch.Tensor]]  # this tensor-parallel rank's parts, by DeepSpeed's own functions


@dataclass
class Saved:
    checkpoint: Path
    told: list[Told]


# So that DeepSpeed has to pad on four ranks, single parameters under ZeRO 3 and whole groups under ZeRO 1 and 2.
ODD = {"hidden_size": 30, "num_attention_heads": 2, "num_layers": 1}
VARIANTS = {
    "gpt2": {"model": {"style": "gpt2", **ODD}},
    "llama": {"model": {"style": "llama", "num_query_groups": 2}},
    "gpt2-bf16": {"model": {"style": "gpt2", "tied_embeddings": False, **ODD}, "precision": "bf16"},
    "llama-bf16": {"model": {"style": "llama", "num_query_groups": 2, "tied_embeddings": True}, "precision": "bf16"},
}


def on_layout(recipe: Recipe, layout: Layout, root: Path, sharding: str = "") -> Recipe:
    """The recipe of a run in ``root/LAYOUT``."""
    recipe = change(
        recipe,
        name=str(layout),
        output_root=str(root),
        batch={"train_steps": STEPS},
        parallel={
            "tensor_model_parallel_size": layout.tensor,
            "data_parallel_size": layout.data,
            "sharding": sharding or f"zero{layout.stage}",
        },
    )
    recipe.check()
    return recipe


def save_on(recipe: Recipe, layout: Layout, root: Path, sharding: str = "") -> Saved:
    """Train from the beginning, save at ``SAVED_AT``, and go on to ``STEPS``."""
    told = run_ranks(_train_and_save, layout.world_size, on_layout(recipe, layout, root, sharding))
    return Saved(_checkpoint(root, layout), told)


def resume_on(recipe: Recipe, layout: Layout, root: Path, checkpoint: Path, sharding: str = "") -> Saved:
    """Load, save again at once, and train to the end."""
    told = run_ranks(_resume, layout.world_size, on_layout(recipe, layout, root, sharding), checkpoint)
    return Saved(_checkpoint(root, layout), told)


def differences(before: Saved, after: Saved, tolerance: float) -> list[str]:
    """How a run that was moved is not the one that was saved; empty where it is."""
    one, other = PortableCheckpoint(before.checkpoint), PortableCheckpoint(after.checkpoint)
    found = [
        f"{kind} of {name}"
        for name in one.names()
        for kind in KINDS
        if not torch.equal(one.tensor(name, kind), other.tensor(name, kind))
    ]
    if one.names() != other.names() or one.adam_step != other.adam_step:
        found.append(f"parameters or Adam's step: {one.adam_step}, {other.adam_step}")
    if {rank.progress for rank in after.told} != {rank.progress for rank in before.told}:
        found.append(f"progress: {before.told[0].progress}, {after.told[0].progress}")
    if whole_counts(before.told) != whole_counts(after.told):
        found.append("token counts")
    expected = before.told[0].losses[SAVED_AT:]
    if not all(abs(a - b) <= tolerance for rank in after.told for a, b in zip(rank.losses, expected, strict=True)):
        found.append(f"losses: {after.told[0].losses}, expected {expected}")
    return found


def whole_counts(told: list[Told]) -> list[int]:
    """Appearances of every id of the padded vocabulary, which all replicas must agree on."""
    shards: dict[int, list[int]] = {}
    for rank in told:
        start, appearances = rank.counts
        assert shards.setdefault(start, appearances) == appearances
    return [count for start in sorted(shards) for count in shards[start]]


def _checkpoint(root: Path, layout: Layout) -> Path:
    return root / str(layout) / "checkpoints" / f"step_{SAVED_AT:08d}"


def _train_and_save(rank: int, world_size: int, recipe: Recipe) -> Told:
    from pretrain.topology import connect
    from pretrain.training.setup import build_run

    run = build_run(recipe, connect(recipe))
    losses = _advance(run, SAVED_AT)
    _save(run)
    told = _tell(run)
    told.losses = losses + _advance(run, STEPS - SAVED_AT)
    return told


def _resume(rank: int, world_size: int, recipe: Recipe, checkpoint: Path) -> Told:
    from pretrain.checkpointing.checkpoint import load_checkpoint
    from pretrain.topology import connect
    from pretrain.training.setup import build_run

    run = build_run(recipe, connect(recipe))
    load = run.objective.load_state_dict
    run.progress = load_checkpoint(run.engine, checkpoint, load, run.topology, run.identity, recipe.seed)
    _save(run)
    told = _tell(run)
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
    run.saver.wait()


def _tell(run: Any) -> Told:
    frequency = run.objective.module.frequency
    return Told(
        run.topology.tensor_parallel_rank,
        torch.initial_seed(),
        [],
        dataclasses.astuple(run.progress),
        (run.shard.start, frequency.appearances.tolist()),
        _tensors_by_deepspeed(run.engine) if run.progress.step else {},
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
