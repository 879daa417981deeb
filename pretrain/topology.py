"""World size and degrees to process groups. The only place that reads rank variables of a launcher."""

from __future__ import annotations

import datetime
import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from pretrain.errors import RecipeError, UserError
from pretrain.recipe import Recipe
from pretrain.recipe_checks import batch_problems

TIMEOUT = datetime.timedelta(minutes=30)


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


@dataclass(frozen=True)
class Topology:
    """Ranks, groups and the device of this process. Neighbouring ranks share a tensor-parallel group."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    tensor_parallel_rank: int
    tensor_parallel_size: int
    data_parallel_rank: int
    data_parallel_size: int
    tensor_parallel_group: dist.ProcessGroup
    data_parallel_group: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        kind = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return (
            f"{self.world_size} rank(s) on {kind}: tensor-parallel {self.tensor_parallel_size} x "
            f"data-parallel {self.data_parallel_size}"
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


def check_devices(recipe: Recipe, local_ranks: int) -> None:
    """
    Raises:
        UserError: there are GPUs, but not one for each rank on this machine; or none where the recipe wants them.
    """
    if recipe.device == "cpu":
        return
    there = torch.cuda.device_count()
    if there == 0 and recipe.device == "cuda":
        raise UserError("device is cuda, but this machine has no GPU that torch can use; device=cpu runs without")
    if 0 < there < local_ranks:
        raise UserError(
            f"{local_ranks} ranks on this machine, but {there} GPU(s): lower the degrees of parallel, or run it "
            "on the CPU with device=cpu"
        )


def connect(recipe: Recipe) -> Topology:
    """Join the world a launcher made, or a world of one, and build the groups.

    torch.distributed may be initialised already (by a test harness); then its world is used.
    """
    from megatron.core import parallel_state

    place = place_from_environment() or Place(0, 1, 0)
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # DeepSpeed insists; srun does not set it
    on_gpu = recipe.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    data_parallel_size_of(recipe, place.world_size)
    timeout = max(TIMEOUT, datetime.timedelta(minutes=4 * recipe.hang_timeout_minutes))  # the watchdog comes first
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _initialize(place, "nccl" if on_gpu else "gloo", timeout)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=recipe.parallel.tensor_model_parallel_size,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
        )
    return Topology(
        rank=place.rank,
        world_size=place.world_size,
        local_rank=place.local_rank,
        device=device,
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        tensor_parallel_group=parallel_state.get_tensor_model_parallel_group(),
        data_parallel_group=parallel_state.get_data_parallel_group(),
    )


def disconnect() -> None:
    """Leave the world; nothing to do when it was never joined."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _initialize(place: Place, backend: str, timeout: datetime.timedelta) -> None:
    if "MASTER_ADDR" not in os.environ and place.world_size > 1 and "SLURM_STEP_NODELIST" in os.environ:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = _slurm_rendezvous()
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, rank=place.rank, world_size=place.world_size, timeout=timeout)
        return
    if place.world_size > 1:
        raise UserError(
            f"{place.world_size} ranks were started, but MASTER_ADDR and MASTER_PORT do not say where they meet; "
            "start them with torchrun or slurm/launch.sh"
        )
    dist.init_process_group(
        backend,
        store=dist.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
        timeout=timeout,
    )


def _slurm_rendezvous() -> tuple[str, str]:
    """The first node of this srun, where rank 0 is, and a port that other jobs on it are unlikely to use."""
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    try:
        first = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"srun started this rank, but {' '.join(command)} does not name its nodes: {error}") from error
    return first, str(20_000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20_000)


class DeepSpeedGroups:
    """The ``mpu`` that DeepSpeed asks: megatron-core's groups under the names it uses.

    DeepSpeed calls the tensor-parallel ranks of one replica "model parallel".
    """

    _RENAMED: ClassVar = {
        "get_model_parallel_rank": "get_tensor_model_parallel_rank",
        "get_model_parallel_world_size": "get_tensor_model_parallel_world_size",
        "get_model_parallel_group": "get_tensor_model_parallel_group",
        "get_model_parallel_src_rank": "get_tensor_model_parallel_src_rank",
    }
    _SAME = (
        "get_data_parallel_rank",
        "get_data_parallel_world_size",
        "get_data_parallel_group",
        "get_tensor_model_parallel_rank",
        "get_tensor_model_parallel_world_size",
        "get_tensor_model_parallel_group",
        "get_tensor_model_parallel_src_rank",
        "get_pipeline_model_parallel_rank",
        "get_pipeline_model_parallel_world_size",
        "get_pipeline_model_parallel_group",
    )

    def __init__(self) -> None:
        from megatron.core import parallel_state

        for name in self._SAME:
            setattr(self, name, getattr(parallel_state, name))
        for name, original in self._RENAMED.items():
            setattr(self, name, getattr(parallel_state, original))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"DeepSpeed asks for {name}, which this layout does not have")
