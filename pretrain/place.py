"""Where a launcher put this process, and whether its world is one for the recipe.

Without torch, which takes seconds to import: what is refused before ranks start does not wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.cluster.job import node_name
from pretrain.errors import RecipeError, UserError
from pretrain.recipe import Recipe
from pretrain.recipe_checks import batch_problems

LISTENING_SOCKET = "PRETRAIN_LISTENING_SOCKET"  # the number of a descriptor that pretrain.launch gives to rank 0


@dataclass(frozen=True)
class Place:
    """Where a launcher put this process."""

    rank: int
    world_size: int
    local_rank: int


def place_from_environment(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place that torchrun, the deepspeed launcher or srun gave; None if none of them started this process.

    Raises:
        UserError: variables that contradict each other or are incomplete.
    """
    families = {  # launcher -> rank, world size, local rank
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    }
    for launcher, names in families.items():
        if names[0] not in environment or (launcher == "srun" and "SLURM_STEP_ID" not in environment):
            continue  # in a batch script outside srun there is a job, but no step
        try:
            rank, world_size, local_rank = (int(environment[name]) for name in names)
        except (KeyError, ValueError) as error:
            raise UserError(f"{launcher} set {names[0]}, but {error} is missing or not a number") from error
        if not 0 <= rank < world_size:
            raise UserError(f"{names[0]}={rank} is not in a world of {names[1]}={world_size}")
        if launcher == "srun" and world_size == 1:
            continue  # a shell or a single task, which may start ranks of its own
        return Place(rank, world_size, local_rank)
    return None


def asked_world_size(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many ranks launch.sh, or somebody who sets the variable, wants; None if nobody says."""
    return number_in(environment, "PRETRAIN_WORLD_SIZE")


def asked_nodes(environment: Mapping[str, str] = os.environ) -> int | None:
    """How many nodes SLURM gave to this job; None outside a job."""
    return number_in(environment, "SLURM_JOB_NUM_NODES")


def check_plain_start(place: Place | None, local_world_size: int, environment: Mapping[str, str] = os.environ) -> None:
    """
    Raises:
        UserError: no launcher started this process, and its ranks would not be what the job is for.
    """
    asked, nodes = asked_world_size(environment), asked_nodes(environment) or 1
    if place is not None or local_world_size == asked:
        return
    start = "start it on all nodes with: bash slurm/launch.sh train RECIPE"
    if asked is not None:
        raise UserError(
            f"PRETRAIN_WORLD_SIZE asks for {asked} ranks, but no launcher started this train, and it would start "
            f"{local_world_size} on {node_name(environment)} alone: {start}, or unset PRETRAIN_WORLD_SIZE"
        )
    if nodes > 1:
        raise UserError(
            f"this SLURM job has {nodes} nodes, but no launcher started this train, and it would use only "
            f"{node_name(environment)}: {start}. If one node is meant: PRETRAIN_WORLD_SIZE={local_world_size}"
        )


def data_parallel_size_of(recipe: Recipe, world_size: int) -> int:
    """How many data-parallel ranks this world gives the recipe.

    Raises:
        RecipeError: the world does not divide, is not the one the recipe asks for, or the batch does not fit it.
    """
    degree, asked = recipe.parallel.tensor_model_parallel_size, recipe.parallel.data_parallel_size
    if world_size % degree:
        raise RecipeError(
            [f"parallel.tensor_model_parallel_size ({degree}) does not divide the {world_size} started ranks"],
            f"the layout of {recipe.name}",
        )
    size = world_size // degree
    problems = batch_problems(recipe, size)
    if asked is not None and asked != size:
        problems.append(
            f"parallel.data_parallel_size is {asked} and tensor_model_parallel_size {degree}, which needs "
            f"{asked * degree} ranks, but {world_size} were started"
        )
    if problems:
        raise RecipeError(problems, f"the layout of {recipe.name}")
    return size


def choose_device(recipe: Recipe) -> None:
    """Hide the GPUs from everything in this process and the ranks it starts, if the recipe is for the CPU."""
    if recipe.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def number_in(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    try:
        return None if text is None else int(text)
    except ValueError as error:
        raise UserError(f"{name} is {text!r}, must be a whole number") from error
