"""Nodes that cannot train together are refused by all ranks with one message that names them."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain import topology as topology_module
from pretrain.cluster import network, preflight
from pretrain.run_folder import RunFolder
from pretrain.topology import connect
from tests.cluster.nodes import LONE, PAIRS, preflight_rank, refused
from tests.distributed import run_ranks
from tests.small_runs import change, on_ranks


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_nodes_that_are_alike(recipe, world_size, ranks_per_node):
    outcomes = run_ranks(preflight_rank, world_size, on_ranks(recipe, world_size), ranks_per_node)
    nodes = world_size // ranks_per_node
    for figures in outcomes:
        assert (figures["world_size"], figures["nodes"]) == (world_size, nodes)
        assert figures["free_disk_bytes"] > 0
        assert ("all_reduce_gigabytes_per_second" in figures) == (world_size > 1)
        assert ("clock_skew_seconds" in figures) == (nodes > 1)
    if world_size > 1:
        assert figures["all_reduce_gigabytes_per_second"] > 0
    if nodes > 1:
        assert 0 <= figures["clock_skew_seconds"] < 0.5  # it is one clock
    assert not list(Path(recipe.run_folder).glob(".preflight*"))


def test_twice_in_one_process(recipe):
    def twice(rank, recipe, folder):
        preflight.preflight(recipe, connect(recipe), folder)

    for figures in run_ranks(preflight_rank, 2, on_ranks(recipe, 2), LONE, twice):
        assert figures["nodes"] == 2


def test_what_rank_0_prints(recipe, capfd):
    run_ranks(preflight_rank, 4, on_ranks(recipe, 4), PAIRS)
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("preflight: 4 ranks on 2 node(s), all-reduce ") and " GB/s, clocks within " in line


def test_another_version(recipe):
    def other_version(rank, recipe, folder):
        if rank == 2:
            preflight.versions = lambda: {**versions, "torch": "2.9.1"}

    versions = preflight.versions()
    message = refused(recipe, 4, LONE, other_version)
    assert message.startswith(f"torch is 2.9.1 on node2, but {versions['torch']} on node0, node1, node3: ")


def test_another_version_on_the_first_node(recipe):
    def other_version(rank, recipe, folder):
        if rank == 0:
            preflight.versions = lambda: {**versions, "deepspeed": "0.1"}

    versions = preflight.versions()
    message = refused(recipe, 4, LONE, other_version)
    assert message.startswith(f"deepspeed is 0.1 on node0, but {versions['deepspeed']} on node1, node2, node3: ")


def test_another_recipe(recipe):
    def other_recipe(rank, recipe, folder):
        return (change(recipe, optimizer={"learning_rate": 0.5}), folder) if rank == 1 else None

    message = refused(recipe, 4, LONE, other_recipe)
    assert message.startswith("the recipe on node1 has SHA-256 ") and " on node0, node2, node3 " in message
    assert "(optimizer.learning_rate is 0.5 there, 0.003 elsewhere)" in message


def test_everything_that_differs_in_one_message(recipe):
    def two_things(rank, recipe, folder):
        if rank == 1:
            preflight.versions = lambda: {**versions, "python": "3.1"}
            return change(recipe, seed=7), folder
        return None

    versions = preflight.versions()
    message = refused(recipe, 2, LONE, two_things)
    assert "python is 3.1 on node1" in message and "seed is 7 there, 1234 elsewhere" in message


def test_more_ranks_were_asked_for(recipe):
    def asks_for_more(rank, recipe, folder):
        os.environ["PRETRAIN_WORLD_SIZE"] = "8"

    message = refused(recipe, 4, PAIRS, asks_for_more)
    assert message.startswith(
        "4 rank(s) on 2 node(s) (node0: 2, node1: 2) were started, but PRETRAIN_WORLD_SIZE asks for 8: "
    )


def test_one_rank_where_more_were_asked_for(recipe):
    def asks_for_more(rank, recipe, folder):
        os.environ["PRETRAIN_WORLD_SIZE"] = "2"

    assert "1 rank(s) on 1 node(s) (node0: 1) were started" in refused(recipe, 1, LONE, asks_for_more)


def test_ranks_on_one_node_of_a_job_with_two(recipe):
    def in_a_job(rank, recipe, folder):
        os.environ["SLURM_JOB_NUM_NODES"] = "2"

    message = refused(recipe, 2, PAIRS, in_a_job)
    assert "2 rank(s) on 1 node(s) (node0: 2) were started, but the SLURM job has 2 nodes" in message


def test_asked_for_ranks_on_one_node_of_a_job_with_two(recipe):
    def in_a_job(rank, recipe, folder):
        os.environ.update(SLURM_JOB_NUM_NODES="2", PRETRAIN_WORLD_SIZE="2")

    assert run_ranks(preflight_rank, 2, on_ranks(recipe, 2), PAIRS, in_a_job)[0]["nodes"] == 1


def test_names_that_slurm_gives(recipe):
    def named_by_slurm(rank, recipe, folder):
        os.environ.update(SLURMD_NODENAME=f"slurm{rank}", PRETRAIN_WORLD_SIZE="3")

    assert "(slurm0: 1, slurm1: 1)" in refused(recipe, 2, LONE, named_by_slurm)


def test_a_folder_that_is_not_shared(recipe, tmp_path):
    def other_folder(rank, recipe, folder):
        preflight.VISIBLE_SECONDS = 0.2
        if rank // 2 == 1:
            (tmp_path / "local").mkdir(exist_ok=True)
            return recipe, RunFolder(tmp_path / "local")
        return None

    message = refused(recipe, 4, PAIRS, other_folder)
    assert message.startswith("the run folder is not shared: what rank 0 on node0 wrote there does not show within ")
    assert f" in {tmp_path}/local on node1. " in message


def test_a_folder_that_shows_late(recipe):
    def slow_disk(rank, recipe, folder):
        real, tries = Path.read_text, []

        def late(path, *arguments, **options):
            if rank == 1 and ".preflight_" in path.name:
                tries.append(path)
                if len(tries) < 3:
                    raise FileNotFoundError(path)
            return real(path, *arguments, **options)

        Path.read_text = late

    assert run_ranks(preflight_rank, 2, on_ranks(recipe, 2), LONE, slow_disk)[1]["nodes"] == 2


def test_a_folder_that_cannot_be_written(recipe):
    def no_writing(rank, recipe, folder):
        def refuse(path, *arguments, **options):
            raise PermissionError(13, "Permission denied", str(path))

        Path.write_text = refuse

    message = refused(recipe, 2, LONE, no_writing)
    assert message.startswith(f"rank 0 on node0 cannot write {recipe.run_folder}/.preflight_")
    assert message.endswith(": Permission denied")


@pytest.mark.parametrize(
    ("checkpoints", "free", "fits"), [(0, 1.9, False), (0, 2.1, True), (2, 1.1, True), (2, 0.9, False)]
)
def test_disk(recipe, checkpoints, free, fits):
    """A new run needs room for two checkpoints; one that has some already for one more."""
    each = 16 * 42_880  # fp32 weights and their copy, two moments; parameters as the run announces them

    def small_disk(rank, recipe, folder):
        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(0, 0, int(free * each))
        for step in range(checkpoints if rank == 0 else 0):
            (folder.checkpoints / f"step_{step:08d}").mkdir(parents=True)

    if fits:
        figures = run_ranks(preflight_rank, 2, on_ranks(recipe, 2), LONE, small_disk)[1]
        assert figures["free_disk_bytes"] == int(free * each)
        return
    needed = "686.1 kB" if checkpoints else "1.4 MB"
    assert refused(recipe, 2, LONE, small_disk).startswith(
        f"{recipe.run_folder} has {'617.5 kB' if checkpoints else '1.3 MB'} free on its disk, but a checkpoint takes "
        f"about 686.1 kB and {needed} are needed: "
    )


def test_a_wrong_sum(recipe):
    def wrong_sum(rank, recipe, folder):
        if rank == 1:
            network.dist.all_reduce = lambda tensor, **options: real(tensor.add_(1), **options)

    real = dist.all_reduce
    message = refused(recipe, 2, LONE, wrong_sum)
    assert message.startswith(
        "an all-reduce over 2 ranks fails: on node0: the sum is wrong, on node1: the sum is wrong"
    )


def rank_without_a_route(rank, world_size, recipe):
    """Rank 1 cannot take part in the all-reduce, so rank 0 waits for it."""
    kept, real = [], dist.all_reduce
    topology_module.LEAST_ARRIVAL_SECONDS = 3.0

    def refuse(tensor, **options):
        kept.append(tensor)
        raise RuntimeError("no route to host\nand a stack")

    if rank == 1:
        network.dist.all_reduce = refuse
    outcome = preflight_rank(rank, world_size, change(recipe, hang_timeout_minutes=0.01), LONE)
    for tensor in kept:
        real(tensor)  # rank 0 has given up, gloo has not
    return outcome


def test_an_all_reduce_that_hangs(recipe):
    messages = run_ranks(rank_without_a_route, 2, on_ranks(recipe, 2))
    assert messages[0] == messages[1]
    assert "on node1: no route to host. " in messages[0] and "GLOO_SOCKET_IFNAME" in messages[0]
    assert messages[0].startswith("an all-reduce over 2 ranks fails: on node0: ")


@pytest.mark.parametrize(
    ("wrong", "by", "named"),
    [(0, 60, "node0 is 60.0 s ahead"), (2, 60, "node2 is 60.0 s ahead"), (1, -60, "node1 is 60.0 s behind")],
)
def test_a_clock_that_is_wrong(recipe, wrong, by, named):
    def other_clock(rank, recipe, folder):
        real = time.time
        if rank == wrong:
            time.time = lambda: real() + by

    message = refused(change(recipe, batch={"global_batch_size": 6}), 3, LONE, other_clock)
    assert message.startswith(f"clocks differ by more than 5 s: {named}, compared with node")
    assert f"node{wrong}" not in message.partition("compared with")[2]


def test_clocks_of_two_nodes(recipe):
    def other_clock(rank, recipe, folder):
        real = time.time
        if rank == 1:
            time.time = lambda: real() - 7.5

    message = refused(recipe, 2, LONE, other_clock)
    assert "node0 is 7.5 s ahead, compared with node1" in message or "node1 is 7.5 s behind, compared with" in message


def test_skew_that_is_allowed_is_measured(recipe):
    def other_clock(rank, recipe, folder):
        real = time.time
        if rank == 1:
            time.time = lambda: real() - 2

    for figures in run_ranks(preflight_rank, 2, on_ranks(recipe, 2), LONE, other_clock):
        assert abs(figures["clock_skew_seconds"] - 2) < 0.5


def test_slow_reductions_do_not_look_like_skew():
    """Half a minute on the way, entered one after the other: the moment they share is where both clocks can agree."""
    offsets = network.clock_offsets({"a": [(100.0, 130.0), (130.0, 131.0)], "b": [(125.0, 130.1), (130.2, 130.9)]})
    assert all(abs(offset) <= margin <= 1 for offset, margin in offsets.values())
