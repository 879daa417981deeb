"""Loading sharded checkpoints: DeepSpeed's own files, this project's state of each rank, and a manifest.

They are written by :mod:`pretrain.checkpointing.saving`.
"""

from __future__ import annotations

import contextlib
import glob
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from pretrain.checkpointing.folder import (
    checkpoints_in,
    latest_problem,
    problems_of,
    rank_file,
    read_manifest,
    unless_deleted,
)
from pretrain.checkpointing.identity import CHANGEABLE, check_identity
from pretrain.checkpointing.portable import PortableCheckpoint
from pretrain.checkpointing.portable_load import load_portable, seed_of_resume
from pretrain.console import say
from pretrain.errors import CheckpointError, DamagedCheckpoint
from pretrain.quiet import without_prints
from pretrain.randomness import seed_everything
from pretrain.topology import Topology


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int  # steps done, those that were skipped included
    consumed_samples: int  # sequences of the training data set that were seen, those that were skipped included
    consumed_tokens: int  # targets that were trained on
    skipped_samples: tuple[tuple[int, int], ...] = ()  # ranges [start, stop) that were not trained on
    recent: tuple[tuple[float, float], ...] = ()  # loss and gradient norm of the last steps, if spikes are watched for
    skips_in_a_row: int = 0  # steps skipped one by one since the last that was trained on or a rollback


def resume(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    load_rank_state: Callable[[Any], None],
    topology: Topology,
    identity: dict[str, Any],
    seed: int,
    *,
    allow_changes: bool = False,
) -> Progress | None:
    """Load the newest checkpoint that verifies, and say which were passed over and why; a collective.

    Returns:
        None if nothing was saved yet.

    Raises:
        CheckpointError: there are checkpoints, but none verifies; or the newest that does is of another run.
    """
    # The first rank decides what there is: on a shared file system another may not see it yet.
    there = [path.name for path in checkpoints_in(folder)]
    found: list[Any] = [(there, latest_problem(folder), (folder / "latest").exists())]
    dist.broadcast_object_list(found, src=0)
    names, problem, had_some = found[0]
    free = CHANGEABLE if allow_changes else ()
    for name in names:
        try:
            progress = load_checkpoint(engine, folder / name, load_rank_state, topology, identity, seed, free)
        except DamagedCheckpoint as error:
            if topology.is_first:
                say(f"passed over {name}: {'; '.join(error.problems)}")
        else:
            if topology.is_first and problem is not None:
                say(f"{problem}; {name} is the newest checkpoint that verifies")
            return progress
    if names or had_some:
        raise CheckpointError(
            f"{folder} holds no checkpoint that verifies ({', '.join(names) or 'all are gone'}). Put a copy back, or "
            "start again with --from-scratch, which moves what is there aside"
        )
    return None


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    checkpoint: Path,
    load_rank_state: Callable[[Any], None],
    topology: Topology,
    identity: dict[str, Any],
    seed: int,
    free: tuple[str, ...] = (),
) -> Progress:
    """Continue from a checkpoint; a collective. Ranks share the hashing of its files.

    On the layout that saved it everything goes on bit for bit. On another one weights, Adam's state, token counts and
    the order of the data go on exactly; the random streams of dropout cannot, as there are more or fewer of them now:
    every data-parallel rank starts a new one, see :func:`seed_of_resume`.

    Args:
        load_rank_state: is given what this rank saved, or on another layout what all ranks saved, in turn.
        seed: of the recipe.
        free: what of the identity may differ, see :func:`~pretrain.checkpointing.identity.check_identity`.

    Raises:
        DamagedCheckpoint: on all ranks, and nothing was loaded.
        CheckpointError: it is of another precision, of other data, or of another recipe.
        UserError: it was deleted meanwhile.
    """
    _verify(checkpoint, topology)
    with unless_deleted(checkpoint):
        manifest = read_manifest(checkpoint)
        check_identity(checkpoint, manifest, identity, free)
        progress = Progress(
            manifest["step"],
            manifest["consumed_samples"],
            manifest["consumed_tokens"],
            skipped_samples=tuple(tuple(pair) for pair in manifest["skipped_samples"]),
            recent=tuple(tuple(pair) for pair in manifest["recent"]),
            skips_in_a_row=manifest.get("skips_in_a_row", 0),  # earlier versions did not save it
        )
        saved, layout = manifest["layout"], layout_of(engine, topology)
        differences = [f"{key} {saved[key]}, now {value}" for key, value in layout.items() if saved[key] != value]
        if saved["bf16"] != layout["bf16"]:
            raise CheckpointError(
                f"{checkpoint} was trained in another precision: bf16 was {saved['bf16']}, now {layout['bf16']}"
            )
        if differences:
            if topology.is_first:
                say(
                    f"{checkpoint.name} was saved on another layout ({'; '.join(differences)}) and is moved to this one"
                )
            portable = PortableCheckpoint(checkpoint, manifest)
            load_portable(engine, portable, topology)
            load_rank_state(portable.rank_states())
            seed_everything(seed_of_resume(seed, topology.data_parallel_rank, progress.consumed_samples))
            return progress
        names = type(engine)._get_all_ckpt_names  # globs: in a path, "[1]" is no pattern
        engine._get_all_ckpt_names = lambda parent, tag: names(engine, glob.escape(parent), tag)
        with _own_options(engine), without_prints():
            engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False)
        state = torch.load(checkpoint / rank_file(topology.rank), map_location="cpu", weights_only=False)
        load_rank_state(state["rank_state"])
        _set_random_state(state["random"], topology.device)
        return progress


@contextlib.contextmanager
def _own_options(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Weight decay, betas and clipping stay the recipe's: DeepSpeed would put those of the checkpoint there."""
    options = [{k: v for k, v in group.items() if k != "params"} for group in engine.basic_optimizer.param_groups]
    clip = getattr(engine.optimizer, "clip_grad", None)
    yield
    for group, own in zip(engine.basic_optimizer.param_groups, options, strict=True):
        group.update(own)
    if clip is not None:
        engine.optimizer.clip_grad = clip


def layout_of(engine: deepspeed.DeepSpeedEngine, topology: Topology) -> dict[str, Any]:
    """Everything that decides where DeepSpeed's files have which element."""
    return {
        "world_size": topology.world_size,
        "tensor_model_parallel_size": topology.tensor_parallel_size,
        "data_parallel_size": topology.data_parallel_size,
        "zero_stage": engine.zero_optimization_stage(),
        "bf16": engine.bfloat16_enabled(),
        "optimizer": type(engine.optimizer).__name__,
        "round_robin_gradients": engine.zero_round_robin_gradients(),
        "parameter_alignment": engine.zero_parameter_alignment(),
        "sub_group_size": engine.zero_sub_group_size(),
    }


def random_state(device: torch.device) -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "cuda":  # saved without a GPU
        torch.cuda.manual_seed(torch.initial_seed())
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _verify(checkpoint: Path, topology: Topology) -> None:
    """Every rank looks at its share, sizes and hashes, and all hear of every bad file."""
    everyone: list[Any] = [None] * topology.world_size
    own = problems_of(checkpoint, share=slice(topology.rank, None, topology.world_size))
    dist.all_gather_object(everyone, own)
    problems = dict.fromkeys(problem for found in everyone for problem in found)
    if problems:
        raise DamagedCheckpoint(checkpoint, list(problems))
