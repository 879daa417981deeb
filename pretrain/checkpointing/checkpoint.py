"""Sharded checkpoints: DeepSpeed's own files, this project's state of each rank, and a manifest.

``checkpoints/step_00000100/`` is written under a temporary name and renamed when every rank's files are there;
``checkpoints/latest`` then names it.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from pretrain import __version__
from pretrain.checkpointing.folder import check_whole, checkpoint_name
from pretrain.checkpointing.fragments import optimizer_order
from pretrain.checkpointing.portable import PortableCheckpoint, write_parameters
from pretrain.checkpointing.portable_load import load_portable, seed_of_resume
from pretrain.checkpointing.split import parameter_splits
from pretrain.console import say
from pretrain.errors import UserError
from pretrain.files import write_json, write_text
from pretrain.randomness import seed_everything
from pretrain.topology import Topology

FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int  # optimizer steps done
    consumed_samples: int  # sequences of the training data set that were trained on
    consumed_tokens: int


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    folder: Path,
    progress: Progress,
    rank_state: dict[str, Any],
    topology: Topology,
    identity: dict[str, str],
    keep_last: int,
) -> Path:
    """Save all ranks' state; a collective.

    Args:
        rank_state: what this rank needs beside the engine (token counts).
        identity: hashes that a resumed run must share (data, recipe).
        keep_last: older checkpoints beyond so many are deleted.
    """
    final = folder / checkpoint_name(progress.step)
    temporary = folder / f"tmp_{final.name}"
    if topology.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    state = {"rank_state": rank_state, "random": _random_state(topology.device)}
    torch.save(state, temporary / _rank_file(topology.rank))
    if topology.is_first:
        splits = parameter_splits(engine.module, topology.tensor_parallel_size)
        write_parameters(temporary, splits, optimizer_order(engine))
    dist.barrier()
    if topology.is_first:
        files = {
            str(path.relative_to(temporary)): path.stat().st_size
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        write_json(
            temporary / "MANIFEST.json",
            {
                "format": FORMAT,
                "step": progress.step,
                "consumed_samples": progress.consumed_samples,
                "consumed_tokens": progress.consumed_tokens,
                "layout": layout_of(engine, topology),
                "identity": identity,
                "versions": {"pretrain": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__},
                "files": files,
            },
        )
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        write_text(folder / "latest", final.name + "\n")
        _delete_old(folder, keep_last)
    dist.barrier()
    return final


def load_checkpoint(
    engine: deepspeed.DeepSpeedEngine,
    checkpoint: Path,
    load_rank_state: Callable[[Any], None],
    topology: Topology,
    identity: dict[str, str],
    seed: int,
) -> Progress:
    """Continue from a checkpoint; a collective.

    On the layout that saved it everything goes on bit for bit. On another one weights, Adam's state, token counts and
    the order of the data go on exactly; the random streams of dropout cannot, as there are more or fewer of them now:
    every data-parallel rank starts a new one, see :func:`seed_of_resume`.

    Args:
        load_rank_state: is given what this rank saved, or on another layout the list of what all ranks saved.
        seed: of the recipe.

    Raises:
        UserError: the checkpoint is of another precision or of other data, or not whole.
    """
    manifest = check_whole(checkpoint)
    for key, value in identity.items():
        if manifest["identity"].get(key) != value:
            raise UserError(f"{checkpoint} was trained on another {key}: {manifest['identity'].get(key)}, now {value}")
    progress = Progress(manifest["step"], manifest["consumed_samples"], manifest["consumed_tokens"])
    saved, layout = manifest["layout"], layout_of(engine, topology)
    differences = [
        f"{key} {saved[key]}, now {value}" for key, value in layout.items() if saved.get(key, value) != value
    ]
    if saved["bf16"] != layout["bf16"]:
        raise UserError(
            f"{checkpoint} was trained in another precision: bf16 was {saved['bf16']}, now {layout['bf16']}"
        )
    if differences:
        if topology.is_first:
            say(f"{checkpoint.name} was saved on another layout ({'; '.join(differences)}) and is moved to this one")
        portable = PortableCheckpoint(checkpoint)
        load_portable(engine, portable, topology)
        load_rank_state(portable.rank_states())
        seed_everything(seed_of_resume(seed, topology.data_parallel_rank, progress.consumed_samples))
        return progress
    engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False)
    state = torch.load(checkpoint / _rank_file(topology.rank), map_location="cpu", weights_only=False)
    load_rank_state(state["rank_state"])
    _set_random_state(state["random"], topology.device)
    return progress


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


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _delete_old(folder: Path, keep_last: int) -> None:
    kept = sorted(path for path in folder.glob("step_*") if (path / "MANIFEST.json").exists())
    for path in kept[:-keep_last]:
        shutil.rmtree(path)
    for path in folder.glob("tmp_step_*"):
        shutil.rmtree(path)


def _random_state(device: torch.device) -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
