"""World size and degrees to process groups, on a device for each rank."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from pretrain.cluster.job import node_name, rendezvous_port
from pretrain.cluster.meeting import Meeting, Report, Whereabouts, numbers, some
from pretrain.errors import PreflightError, UserError
from pretrain.place import LISTENING_SOCKET, Place, data_parallel_size_of, number_in, place_from_environment
from pretrain.recipe import Recipe

TIMEOUT = datetime.timedelta(minutes=30)
LEAST_ARRIVAL_SECONDS = 60.0  # imports from a busy disk take as long


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


def check_devices(recipe: Recipe, local_ranks: int) -> None:
    """
    Raises:
        UserError: there are GPUs, but not one for each rank on this machine; or none where the recipe wants them.
    """
    found = {"device": recipe.device, "gpus": _usable_gpus(recipe)}
    _judge_devices([Report(rank, node_name(), found | {"local_rank": rank}) for rank in range(local_ranks)])


def _usable_gpus(recipe: Recipe) -> int:
    return torch.cuda.device_count() if recipe.device != "cpu" and torch.cuda.is_available() else 0


def _judge_devices(reports: list[Report]) -> None:
    """All ranks on a GPU each, or all on the CPU."""
    without = [report for report in reports if report.found["gpus"] == 0]
    blind = [report for report in without if report.found["device"] == "cuda"]
    if blind:
        raise UserError(f"device is cuda, but torch can use no GPU {_places(blind)}; device=cpu runs without")
    if 0 < len(without) < len(reports):
        devices = ", ".join(sorted({report.found["device"] for report in without}))
        raise UserError(
            f"{_places(without)} there is no GPU that torch can use (device is {devices}), but there is "
            f"{_places([report for report in reports if report.found['gpus'] > 0])}: leave those without out "
            "(--exclude), or run all of it on the CPU with device=cpu"
        )
    for report in reports if not without else ():
        if report.found["local_rank"] >= report.found["gpus"]:
            count = Counter(other.node for other in reports)[report.node]
            raise UserError(
                f"{count} ranks on {report.node}, but {report.found['gpus']} GPU(s) that rank {report.rank} can use: "
                "start fewer there, or run it on the CPU with device=cpu. train takes lower degrees of parallel; "
                "evaluate and generate need as many ranks as the checkpoint was saved on, and python -m pretrain "
                "checkpoint reshard RUN parallel.data_parallel_size=... saves it for fewer"
            )


def _places(reports: list[Report]) -> str:
    ranks: dict[str, list[int]] = {}
    for report in reports:
        ranks.setdefault(report.node, []).append(report.rank)
    return "on " + some(f"{node} ({numbers('rank', of_node)})" for node, of_node in ranks.items())


def connect(recipe: Recipe) -> Topology:
    """Join the world a launcher made, or a world of one, and build the groups.

    torch.distributed may be initialised already (by a test harness); then its world is used.

    Raises:
        PreflightError: on all ranks, the same: ranks are missing, or do not have a GPU each, or some have none.
    """
    from megatron.core import parallel_state

    place = place_from_environment() or Place(0, 1, 0)
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))  # DeepSpeed insists; srun does not set it
    gpus = _usable_gpus(recipe)
    on_gpu = gpus > 0
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    data_parallel_size_of(recipe, place.world_size)
    timeout = max(TIMEOUT, datetime.timedelta(minutes=4 * recipe.hang_timeout_minutes))  # the watchdog comes first
    found = {"device": recipe.device, "gpus": gpus, "local_rank": place.local_rank}
    store = None if dist.is_initialized() else _meet(place, found, arrival_seconds(recipe))
    if on_gpu:
        torch.cuda.set_device(device)
    if store is not None:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=timeout
        )
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


@contextlib.contextmanager
def connected(recipe: Recipe) -> Iterator[Topology]:
    """:func:`connect`, and at the end :func:`disconnect`."""
    try:
        yield connect(recipe)
    finally:
        disconnect()


def disconnect() -> None:
    """Leave the world; nothing to do when it was never joined."""
    from megatron.core import parallel_state

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None  # it forgets this one
        dist.destroy_process_group()


def arrival_seconds(recipe: Recipe) -> float:
    """How long ranks wait for each other at the start: as long as for a step that hangs, but not less than a minute."""
    return max(LEAST_ARRIVAL_SECONDS, 60 * recipe.hang_timeout_minutes or TIMEOUT.total_seconds())


def meeting_at(store: Store | None, place: Place | Topology, seconds: float) -> Meeting:
    """A seat of this rank where all ranks meet."""
    first = place.rank - place.local_rank
    local_world_size = number_in(os.environ, "LOCAL_WORLD_SIZE") or place.local_rank + 1
    whereabouts = Whereabouts(node_name(), first, first + local_world_size)
    return Meeting(store, place.rank, place.world_size, whereabouts, seconds, _nodes_of_job)


def _meet(place: Place, found: dict[str, Any], seconds: float) -> Store:
    """The store of a world whose ranks are all there, and have devices to train on together."""
    store = _connect_to_store(place, seconds) if place.world_size > 1 else None
    meeting_at(store, place, seconds).agree("the start", found, _judge_devices)
    return store or HashStore()


def _connect_to_store(place: Place, seconds: float) -> Store:
    """torchrun's store, or one that rank 0 opens, as init_process_group would; but ranks that are missing do not hold
    it up: they are to be named."""
    if "MASTER_ADDR" not in os.environ and "SLURM_STEP_NODELIST" in os.environ:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = _slurm_rendezvous()
    address, port = os.environ.get("MASTER_ADDR"), number_in(os.environ, "MASTER_PORT")
    if address is None or port is None:
        raise UserError(
            f"{place.world_size} ranks were started, but MASTER_ADDR and MASTER_PORT do not say where they meet; "
            "start them with torchrun or slurm/launch.sh"
        )
    listening = os.environ.pop(LISTENING_SOCKET, None)  # the store takes it
    opens = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return TCPStore(
            address,
            port,
            place.world_size,
            opens,
            datetime.timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=int(listening) if opens and listening else None,
        )
    except dist.DistError as error:
        doing = "open the store" if opens else "reach rank 0"
        alone = PreflightError(
            f"rank {place.rank} on {node_name()} cannot {doing} at {address}:{port} within {seconds:.0f} s "
            f"({str(error).splitlines()[0]})"
        )
        alone.on_all_ranks = False
        raise alone from error


def _slurm_rendezvous() -> tuple[str, str]:
    """The first node of this srun, where rank 0 is, and a port that other jobs on it are unlikely to use."""
    first = _node_names(os.environ["SLURM_STEP_NODELIST"])[0]
    return first, str(rendezvous_port())


def _nodes_of_job() -> list[str]:
    """All nodes of this job; none outside one."""
    try:
        return _node_names(os.environ["SLURM_JOB_NODELIST"])
    except (KeyError, UserError):
        return []


def _node_names(node_list: str) -> list[str]:
    command = ["scontrol", "show", "hostnames", node_list]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return [names[0], *names[1:]]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"srun started this rank, but {' '.join(command)} does not name its nodes: {error}") from error
