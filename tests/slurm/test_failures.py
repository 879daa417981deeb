"""One rank or one node fails: the whole job ends, and the last line of its output says which one, where and why."""

from __future__ import annotations

import os
import resource
import signal

import pytest

from tests.slurm.cluster import ROOT
from tests.slurm.runs import MID_RUN, ONE_RANK_A_NODE, RANK, last_line

pytestmark = pytest.mark.slurm

OPTIONS, LAYOUT = ONE_RANK_A_NODE


def assert_nothing_runs(runs):
    for node in ("node1", "node2"):
        assert runs.cluster.processes(node, RANK) == []


def test_a_killed_rank(runs):
    job = runs.train("killed", *OPTIONS, overrides=LAYOUT)
    runs.wait_for_step("killed", job, MID_RUN)
    [victim] = runs.cluster.processes("node2", RANK)
    os.kill(victim, signal.SIGKILL)
    runs.cluster.wait_for(job, "FAILED", seconds=60)
    output, logs = runs.cluster.output(job), runs.folder("killed").logs / f"{job}.0"
    reason = "rank 1 on node2: killed by SIGKILL"
    step = runs.events("killed", "end")[0]["step"]
    assert last_line(output) == f"job {job}.0 failed at step {step}: {reason} (logs of each rank: {logs})"
    assert runs.cluster.exit_code(job) == 128 + signal.SIGKILL
    assert (step, runs.events("killed", "end")[0]["reason"]) == (10, reason)
    assert_nothing_runs(runs)


def test_a_hanging_rank(runs):
    """The others wait for it in the next collective; each has a watchdog."""
    job = runs.train("hanging", *OPTIONS, overrides=(*LAYOUT, "hang_timeout_minutes=0.2"))
    runs.wait_for_step("hanging", job, MID_RUN)
    [victim] = runs.cluster.processes("node2", RANK)
    os.kill(victim, signal.SIGSTOP)
    runs.cluster.wait_for(job, "FAILED", seconds=90)
    assert runs.cluster.exit_code(job) == os.EX_SOFTWARE
    line = last_line(runs.cluster.output(job))
    assert "rank 0 on node1: rank 0 hangs: no end of " in line and "after 12 s" in line
    assert "no end of" in (runs.folder("hanging").stacks / "rank_00000.txt").read_text()
    assert_nothing_runs(runs)


def test_a_disk_that_is_full(runs):
    """The shared one, in mid-run: nothing more can be written, the logs of ranks included."""
    cluster = runs.cluster
    job = runs.train("full", *OPTIONS, overrides=(*LAYOUT, f"output_root={cluster.disk}"))
    runs.wait_for_step("full", job, MID_RUN, root=cluster.outside(cluster.disk))
    cluster.run("node1", "sh", "-c", f"head -c 100m /dev/zero > {cluster.disk}/filler", check=False)
    try:
        cluster.wait_for(job, "FAILED", seconds=60)
    finally:
        cluster.run("node1", "rm", f"{cluster.disk}/filler")
    line = last_line(cluster.output(job))
    assert "No space left on device" in line and " on node" in line and "rank " in line
    assert_nothing_runs(runs)


def test_a_node_that_cannot_write(runs):
    """What its kernel refuses there, others can write: here files above 20 kB."""
    job = runs.train("no_room_there", *OPTIONS, overrides=LAYOUT)
    runs.wait_for_step("no_room_there", job, MID_RUN)
    [victim] = runs.cluster.processes("node2", RANK)
    resource.prlimit(victim, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    runs.cluster.wait_for(job, "FAILED", seconds=60)
    line = last_line(runs.cluster.output(job))
    assert "File too large (rank 1 on node2). Checkpoints saved before are good" in line
    end = runs.events("no_room_there", "end")[0]
    assert (end["action"], end["code"], end["step"]) == ("failed", 2, 10)
    assert_nothing_runs(runs)


def test_a_node_without_the_environment(runs):
    """What all nodes should share is not mounted there: nothing of ours starts."""
    package = str(ROOT / "pretrain/cluster")
    runs.cluster.run("node2", "mount", "-t", "tmpfs", "tmpfs", package)
    try:
        job = runs.train("no_package", *OPTIONS, overrides=LAYOUT)
        runs.cluster.wait_for(job, "FAILED", seconds=60)
    finally:
        runs.cluster.run("node2", "umount", package)
    line = last_line(runs.cluster.output(job))
    assert "no rank started; srun ended with " in line and "node1: " not in line
    assert "; node2: " in line and "No module named pretrain.cluster" in line
    assert_nothing_runs(runs)
