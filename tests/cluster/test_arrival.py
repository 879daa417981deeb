"""Ranks that do not come are named by those that do; a start that would use one node of many is refused."""

from __future__ import annotations

import multiprocessing
import os

import pytest
import torch.distributed as dist

from pretrain import topology as topology_module
from pretrain.cluster import meeting
from pretrain.cluster.job import rendezvous_port
from pretrain.errors import UserError
from pretrain.place import Place, check_plain_start
from pretrain.topology import connect
from tests.cluster.nodes import LONE, PAIRS, be_on_a_node, refused
from tests.small_runs import change


def test_a_rank_that_does_not_arrive(recipe):
    def absent(rank, recipe, folder):
        topology_module.LEAST_ARRIVAL_SECONDS = 4.0
        return (None, None) if rank == 3 else (change(recipe, hang_timeout_minutes=0.001), folder)

    message = refused(recipe, 4, PAIRS, absent)
    assert message.startswith("1 of 4 ranks did not come to the preflight within 4 s: rank 3 on node1. ")


def test_a_first_rank_that_does_not_arrive(recipe):
    def absent(rank, recipe, folder):
        topology_module.LEAST_ARRIVAL_SECONDS = 4.0
        return (None, None) if rank == 0 else (change(recipe, hang_timeout_minutes=0.001), folder)

    message = refused(recipe, 2, LONE, absent)
    assert message.startswith("rank 1 on node1 heard nothing from rank 0 within 4 s in the preflight (")


def connect_rank(rank, world_size, port, recipe, outcomes):
    be_on_a_node(rank, PAIRS)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    topology_module.LEAST_ARRIVAL_SECONDS = 4.0
    topology_module._nodes_of_job = lambda: [f"node{number}" for number in range(world_size // PAIRS)]
    try:
        outcomes.put((rank, connect(recipe).world_size))
        dist.barrier()
    except UserError as error:
        outcomes.put((rank, str(error)))


def connect_on(recipe, ranks, world_size):
    """What connect() says to these ranks of a world, whose store is on a port of this machine."""
    port = rendezvous_port({"SLURM_JOB_ID": str(os.getpid())})
    context = multiprocessing.get_context("fork")
    outcomes = context.Queue()
    processes = [
        context.Process(target=connect_rank, args=(rank, world_size, port, recipe, outcomes), daemon=True)
        for rank in ranks
    ]
    for process in processes:
        process.start()
    try:
        return dict(outcomes.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.join(20)
            process.kill()


def test_ranks_that_never_start(recipe):
    """Of six on three nodes: one of the second node, and the whole third."""
    recipe = change(recipe, hang_timeout_minutes=0.001, batch={"global_batch_size": 12})
    outcomes = connect_on(recipe, [0, 1, 2], 6)
    assert len(set(outcomes.values())) == 1 and set(outcomes) == {0, 1, 2}
    assert str(outcomes[0]).startswith(
        "3 of 6 ranks did not come to the start within 4 s: rank 3 on node1, ranks 4-5; of node2 nothing was heard. "
    )


def test_no_first_rank_at_all(recipe):
    outcomes = connect_on(change(recipe, hang_timeout_minutes=0.001), [1], 2)
    assert str(outcomes[1]).startswith("rank 1 on node0 cannot reach rank 0 at 127.0.0.1:")


def test_ranks_that_all_start(recipe):
    assert connect_on(change(recipe, hang_timeout_minutes=0.0), [0, 1], 2) == {0: 2, 1: 2}


@pytest.mark.parametrize(
    ("environment", "refusal"),
    [
        ({}, None),
        ({"SLURM_JOB_NUM_NODES": "1"}, None),
        (
            {"SLURM_JOB_NUM_NODES": "4", "SLURMD_NODENAME": "n7"},
            "this SLURM job has 4 nodes, .* use only n7: .*launch.sh",
        ),
        ({"SLURM_JOB_NUM_NODES": "4", "PRETRAIN_WORLD_SIZE": "2"}, None),  # meant
        ({"PRETRAIN_WORLD_SIZE": "8"}, "asks for 8 ranks, .* would start 2 on .* alone: .*launch.sh"),
        ({"PRETRAIN_WORLD_SIZE": "eight"}, "PRETRAIN_WORLD_SIZE is 'eight', must be a whole number"),
    ],
)
def test_plain_starts(environment, refusal):
    if refusal is None:
        check_plain_start(None, 2, environment)
    else:
        with pytest.raises(UserError, match=refusal):
            check_plain_start(None, 2, environment)
    check_plain_start(Place(0, 8, 0), 2, {"SLURM_JOB_NUM_NODES": "4"})  # the preflight's business


def test_names():
    assert meeting.numbers("rank", [3]) == "rank 3"
    assert meeting.numbers("rank", [9, 3, 4, 5]) == "ranks 3-5, 9"
    assert meeting.some((f"n{number}" for number in range(1000)), 2) == "n0, n1 and 998 more"
