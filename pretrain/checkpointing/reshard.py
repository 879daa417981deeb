"""``python -m pretrain checkpoint reshard``: a checkpoint saved again as another layout saves it."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import torch.distributed as dist

from pretrain.checkpointing.checkpoint import load_checkpoint
from pretrain.checkpointing.folder import read_manifest
from pretrain.checkpointing.trained_on import trained_on_of
from pretrain.console import say
from pretrain.recipe import Recipe
from pretrain.run_folder import RunFolder
from pretrain.topology import Topology
from pretrain.training.setup import build_run
from pretrain.training.stopping import STOP_SIGNALS


def reshard(folder: RunFolder, checkpoint: Path, recipe: Recipe, topology: Topology) -> None:
    """Put ``checkpoint`` on the layout of these ranks; a collective.

    It is written beside the others first. Then what was there moves to ``aside/``, so that nothing is ever lost.

    Raises:
        CheckpointError: it cannot be loaded here, or the new one cannot be written; nothing has changed.
    """
    run = build_run(recipe, topology)
    load = run.objective.load_state_dict
    progress = load_checkpoint(run.engine, checkpoint, load, topology, run.identity, recipe.seed)
    staging = folder.path / "resharding"
    if topology.is_first:
        shutil.rmtree(staging, ignore_errors=True)  # of one that was killed
    dist.barrier()
    place = trained_on_of(read_manifest(checkpoint))  # not these ranks: they train nothing
    run.saver.save(staging, progress, run.objective.state_dict(), run.identity, place)
    run.saver.wait()
    if topology.is_first:
        for number in STOP_SIGNALS:  # between two renames there is no checkpoint of this step
            signal.signal(number, signal.SIG_IGN)
        aside = folder.replace_checkpoint(checkpoint, staging / checkpoint.name)
        shutil.rmtree(staging)
        say(f"{checkpoint.name} is on {topology.describe()} now; the one before is kept in {aside}")
    dist.barrier()
    run.engine.destroy()  # see pretrain.training.loop.train
