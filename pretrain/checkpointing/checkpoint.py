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
from pretrain.errors import UserError
from pretrain.files import write_json, write_text
from pretrain.topology import Topology

FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int  # steps done, those that were skipped included
    consumed_samples: int  # sequences of the training data set that were seen, those that were skipped included
    consumed_tokens: int  # targets that were trained on
    skipped_samples: tuple[tuple[int, int], ...] = ()  # ranges [start, stop) that were not trained on
    recent: tuple[tuple[float, float], ...] = ()  # loss and gradient norm of the last steps, if spikes are watched for


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
                "skipped_samples": progress.skipped_samples,
                "recent": progress.recent,
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
    load_rank_state: Callable[[dict[str, Any]], None],
    topology: Topology,
    identity: dict[str, str],
) -> Progress:
    """Continue from a checkpoint of the same layout; a collective.

    Raises:
        UserError: the checkpoint is of another layout, of other data, or not whole.
    """
    manifest = check_whole(checkpoint)
    layout = layout_of(engine, topology)
    differences = [
        f"{key}: saved with {manifest['layout'].get(key)}, now {value}"
        for key, value in layout.items()
        if manifest["layout"].get(key) != value
    ]
    if differences:
        raise UserError(f"{checkpoint} was saved on another layout ({'; '.join(differences)}); resume on the same one")
    for key, value in identity.items():
        if manifest["identity"].get(key) != value:
            raise UserError(f"{checkpoint} was trained on another {key}: {manifest['identity'].get(key)}, now {value}")
    engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False)
    state = torch.load(checkpoint / _rank_file(topology.rank), map_location="cpu", weights_only=False)
    load_rank_state(state["rank_state"])
    _set_random_state(state["random"], topology.device)
    return Progress(
        manifest["step"],
        manifest["consumed_samples"],
        manifest["consumed_tokens"],
        *(tuple(tuple(pair) for pair in manifest.get(key, ())) for key in ("skipped_samples", "recent")),
    )


def layout_of(engine: deepspeed.DeepSpeedEngine, topology: Topology) -> dict[str, Any]:
    return {
        "world_size": topology.world_size,
        "tensor_model_parallel_size": topology.tensor_parallel_size,
        "data_parallel_size": topology.data_parallel_size,
        "zero_stage": engine.zero_optimization_stage(),
        "bf16": engine.bfloat16_enabled(),
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
