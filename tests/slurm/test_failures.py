"""One rank or one node fails: the whole job ends, and the last line of its output says which one, where and why."""

from __future__ import annotations

import json
import os
import signal

import pytest

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
    assert "rank 0 on node1: rank 0 hangs: no end of " in line and "rank 1 (node2) said nothing" in line
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


def test_a_node_whose_disk_turns_read_only(runs):
    """As file systems do after errors: one node cannot write what the others can."""
    cluster = runs.cluster
    job = runs.train("read_only", *OPTIONS, overrides=(*LAYOUT, f"output_root={cluster.disk}"))
    runs.wait_for_step("read_only", job, MID_RUN, root=cluster.outside(cluster.disk))
    cluster.run("node2", "mount", "-o", "remount,bind,ro", str(cluster.disk))
    try:
        cluster.wait_for(job, "FAILED", seconds=60)
    finally:
        cluster.run("node2", "mount", "-o", "remount,bind,rw", str(cluster.disk))
    line = last_line(cluster.output(job))
    assert "Read-only file system" in line and "rank 1" in line and "node2" in line
    end = json.loads((cluster.outside(cluster.disk) / "read_only/jobs.jsonl").read_text().splitlines()[-1])
    assert (end["action"], end["step"]) == ("failed", 10)
    assert_nothing_runs(runs)


def test_a_node_on_which_no_process_starts(runs):
    """Its own disk is full: torchrun finds no place for its files."""
    cluster = runs.cluster
    cluster.run("node2", "sh", "-c", "mount -t tmpfs -o size=4k tmpfs /tmp && head -c 4k /dev/zero > /tmp/filler")
    try:
        job = runs.train("no_tmp", *OPTIONS, overrides=LAYOUT)
        cluster.wait_for(job, "FAILED", seconds=60)
    finally:
        cluster.run("node2", "umount", "/tmp")
    line = last_line(cluster.output(job))
    assert "node2" in line and "No usable temporary directory found" in line
    assert_nothing_runs(runs)
