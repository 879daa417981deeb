"""Forked ranks as nodes: what a real node would differ in is changed on its ranks."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from megatron.core import parallel_state  # noqa: F401  # once, not on every forked rank

from pretrain.cluster import preflight
from pretrain.errors import PreflightError
from pretrain.run_folder import RunFolder
from pretrain.topology import connect
from tests.distributed import run_ranks
from tests.small_runs import on_ranks

LONE, PAIRS = 1, 2  # ranks on a node
JOB = ("PRETRAIN_WORLD_SIZE", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURMD_NODENAME")


def be_on_a_node(rank, ranks_per_node):
    """Ranks start on nodes called node0, node1, ..."""
    for name in JOB:
        os.environ.pop(name, None)
    socket.gethostname = lambda: f"node{rank // ranks_per_node}"
    os.environ["LOCAL_RANK"] = str(rank % ranks_per_node)
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)


def preflight_rank(rank, world_size, recipe, ranks_per_node, change_rank=None):
    """The figures, or what was raised. ``change_rank(rank, recipe, folder)`` may replace the recipe and folder."""
    be_on_a_node(rank, ranks_per_node)
    folder = RunFolder(recipe.run_folder)
    topology = connect(recipe)
    if change_rank is not None:
        recipe, folder = change_rank(rank, recipe, folder) or (recipe, folder)
    if recipe is None:
        return None  # this one does not arrive
    try:
        return preflight.preflight(recipe, topology, folder)
    except PreflightError as error:
        return str(error)


def refused(recipe, world_size, ranks_per_node, change_rank):
    """The one message of all ranks that arrived."""
    outcomes = run_ranks(preflight_rank, world_size, on_ranks(recipe, world_size), ranks_per_node, change_rank)
    messages = [outcome for outcome in outcomes if outcome is not None]
    assert isinstance(messages[0], str) and messages.count(messages[0]) == len(messages), outcomes
    assert not list(Path(recipe.run_folder).glob(".preflight*"))
    return messages[0]
