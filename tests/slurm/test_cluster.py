"""The test cluster itself: it is SLURM, its nodes are apart, and failures of nodes are what they are on a real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.waiting import wait_until

pytestmark = pytest.mark.slurm

ONCE_MORE_AFTER_A_RESTART = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --exclusive --requeue --open-mode=append
echo "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"
[ "${SLURM_RESTART_COUNT:-0}" -ge 1 ] && exit 0
srun sh -c 'echo task on $(hostname); exec sleep 300'
"""


def begin(cluster, folder):
    """A job on two nodes whose tasks sleep; it ends at once when it is started again. And the node of its last task."""
    script = folder / "job.sh"
    script.write_text(ONCE_MORE_AFTER_A_RESTART)
    job = cluster.submit(str(script))
    wait_until(lambda: cluster.output(job).count("task on") == 2, 20, "tasks", lambda: cluster.output(job))
    return job, cluster.hosts_of(job)[1]


def reaches(cluster, node, other):
    """Whether slurmd of the other takes a connection."""
    code = f"import socket; socket.create_connection(('{other}', 6818), 1); print('reached')"
    return cluster.run(node, "python", "-c", code, check=False) == "reached\n"


def test_a_job_runs_on_both_nodes(cluster):
    script = 'echo batch on $(hostname); srun sh -c "hostname; hostname -I; echo gpus $CUDA_VISIBLE_DEVICES"'
    job = cluster.submit("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--wrap", script)
    cluster.wait_for(job, "COMPLETED", seconds=20)
    first, second = cluster.hosts_of(job)
    lines = [line.strip() for line in cluster.output(job).splitlines()]
    assert lines[0] == f"batch on {first}" and lines.count("gpus 0,1") == 2
    assert lines.count(first) == lines.count(second) == 1
    addresses = {line for line in lines if line.startswith("10.")}
    assert len(addresses) == 2  # a network each
    failed = cluster.submit("--wrap", "exit 7")
    cluster.wait_for(failed, "FAILED", seconds=20)
    assert cluster.exit_code(failed) == 7


def test_eight_nodes_answer(cluster):
    job = cluster.submit("--nodes=8", "--ntasks-per-node=1", "--wrap", "srun hostname")
    cluster.wait_for(job, "COMPLETED", seconds=20)
    assert sorted(cluster.output(job).split()) == [f"node{i}" for i in range(1, 9)]
    assert [cluster.run(node, "hostname").strip() for node in cluster.nodes] == cluster.nodes
    assert all(reaches(cluster, "node8", node) for node in cluster.nodes)
    assert not cluster.run("node1", "ls", "/dev/shm")


def test_a_crashed_node_and_a_cut_cable(cluster, tmp_path):
    """Both jobs go on elsewhere; of the one with the cut cable an old task lives on."""
    crashed_job, crashed = begin(cluster, tmp_path)
    cut_job, cut = begin(cluster, tmp_path)
    tasks = cluster.processes(cut, "sleep 300")
    assert len(tasks) == 1
    cluster.crash(crashed)
    cluster.unplug(cut)
    for job, victim in ((crashed_job, crashed), (cut_job, cut)):
        cluster.wait_for(job, "COMPLETED", seconds=90, restarts=1)
        assert victim not in cluster.hosts_of(job) and "start 1" in cluster.output(job)
        assert "down" in cluster.node_states()[victim]
    assert cluster.processes(cut, "sleep 300") == tasks
    assert not reaches(cluster, "node8", cut)
    cluster.plug(cut)
    wait_until(lambda: reaches(cluster, "node8", cut), 20, "connection")
    cluster.boot(crashed)
    cluster.wait_for_state(crashed, lambda state: state == "idle", 60)
    job = cluster.submit(f"--nodelist={crashed}", "--wrap", "hostname")
    cluster.wait_for(job, "COMPLETED", seconds=20)
    assert cluster.output(job).split() == [crashed]


def test_what_a_node_mounts_is_seen_by_it_alone(cluster, tmp_path):
    (tmp_path / "shared").write_text("")
    cluster.run("node2", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path))
    try:
        assert cluster.run("node1", "ls", str(tmp_path)).split() == ["shared"]
        assert cluster.run("node2", "ls", str(tmp_path)) == ""
    finally:
        cluster.run("node2", "umount", str(tmp_path))
    assert cluster.run("node2", "ls", str(tmp_path)).split() == ["shared"]


def test_the_small_disk_is_shared_by_nodes_and_not_by_this_machine(cluster):
    cluster.run("node1", "sh", "-c", f"echo here > {cluster.disk}/file")
    assert cluster.run("node8", "cat", f"{cluster.disk}/file") == "here\n"
    assert cluster.outside(cluster.disk / "file").read_text() == "here\n"
    assert os.listdir(cluster.disk) == []
    full = cluster.run("node2", "sh", "-c", f"head -c 100m /dev/zero > {cluster.disk}/file || echo full")
    assert full == "full\n"
    cluster.run("node1", "rm", f"{cluster.disk}/file")


def test_tear_down_sees_what_is_left(tmp_path):
    """The check at the end of every cluster: it finds processes while there are any, and none afterwards."""
    with Cluster(tmp_path, nodes=1) as small:
        job = small.submit("--wrap", "exec sleep 321")
        wait_until(lambda: small.processes("node1", "sleep 321"), 20, "process of the job", lambda: small.output(job))
        seen = small.leftovers()
        assert any("sleep 321" in process for process in seen) and any("slurmctld" in process for process in seen)
        with pytest.raises(AssertionError, match="no COMPLETED of job"):
            small.wait_for(job, "COMPLETED", seconds=0.5)
        small.client("scancel", job)
        with pytest.raises(AssertionError, match="JobState=CANCELLED"):
            small.wait_for(job, "COMPLETED", seconds=20)
    assert small._hosts == {} and str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
