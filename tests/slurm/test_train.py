"""``sbatch slurm/train.sbatch`` on two nodes with two ranks each: what disturbs it leaves no trace in the run."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest

from tests.slurm.runs import MID_RUN, RANK, STEPS, TWO_NODES, last_line
from tests.slurm.waiting import wait_until

pytestmark = pytest.mark.slurm


def test_two_nodes_train_as_one_does(runs, calm):
    job = runs.train("one_node", "--nodes=1", "--gpus-per-node=4")
    runs.cluster.wait_for(job, "COMPLETED", seconds=180)
    runs.assert_same("one_node", calm)
    begin, end = runs.events(calm, "begin"), runs.events(calm, "end")
    assert [event["nodes"] for event in begin] == [["node1", "node2"]] and len(end) == 1
    assert (end[0]["action"], end[0]["code"], end[0]["step"]) == ("done", 0, STEPS)
    logs = runs.folder(calm).logs / begin[0]["incarnation"]
    hosts = [json.loads((logs / f"rank_{rank:05d}.json").read_text())["host"] for rank in range(4)]
    assert hosts == ["node1", "node1", "node2", "node2"]
    assert sorted(path.name for path in logs.glob("rank_*.log")) == [f"rank_{rank:05d}.log" for rank in range(4)]
    output = runs.cluster.output(end[0]["job_id"])
    assert "4 rank(s) on CPU: tensor-parallel 2 x data-parallel 2" in output
    assert last_line(output) == f"job {begin[0]['incarnation']} done at step {STEPS}"


def test_signal_before_the_time_limit(runs, calm):
    """SLURM's warning (``--signal=B:USR1@300`` of train.sbatch) goes to the job's shell, as scancel sends it here."""
    job = runs.train("warned", *TWO_NODES)
    runs.wait_for_step("warned", job, MID_RUN)
    runs.cluster.client("scancel", "--batch", "--signal=USR1", job)
    runs.cluster.wait_for(job, "COMPLETED", seconds=180, restarts=1)
    runs.assert_same("warned", calm)
    first, second = runs.events("warned", "end")
    assert (first["action"], first["code"], second["action"], second["code"]) == ("requeued", 75, "done", 0)
    assert MID_RUN <= first["step"] < STEPS
    assert [event["step"] for event in runs.events("warned", "begin")] == [0, first["step"]]


def test_node_crash(runs, calm):
    """Two jobs at once: one loses the batch host, on which launch.sh and rank 0 run, one the other node."""
    jobs = {victim: runs.train(f"crashed_{victim}", *TWO_NODES) for victim in (0, 1)}
    for victim, job in jobs.items():
        runs.wait_for_step(f"crashed_{victim}", job, MID_RUN)
        runs.cluster.crash(runs.cluster.hosts_of(job)[victim])
        assert runs.records(f"crashed_{victim}") < STEPS
    for victim, job in jobs.items():
        runs.cluster.wait_for(job, "COMPLETED", seconds=240, restarts=1)
        runs.assert_same(f"crashed_{victim}", calm)
        first, second = runs.events(f"crashed_{victim}", "begin")
        lost = first["nodes"][victim]
        assert first["step"] == 0 and second["step"] in range(10, STEPS, 10) and lost not in second["nodes"]
        # Ranks on the other node may end, and say so, before SLURM takes the job away, or while it does.
        without_a_word = f"incarnation {job}.0 on {', '.join(first['nodes'])} ended without a word"
        contact_lost = f"job {job}.0 (requeued|stopped) at step {second['step']}: contact lost with {lost}"
        output = runs.cluster.output(job)
        assert without_a_word in output or re.search(contact_lost, output), output


def test_cut_cable(runs, calm):
    """The old tasks live on with the shared folder in reach, stand still for a while, and go on when others train."""
    cluster, name = runs.cluster, "cut"
    job = runs.train(name, "--nodes=1", "--gpus-per-node=4")
    runs.wait_for_step(name, job, MID_RUN)
    [node] = cluster.hosts_of(job)
    old = cluster.processes(node, RANK)
    assert len(old) == 4
    for process in old:
        os.kill(process, signal.SIGSTOP)
    cluster.unplug(node)
    assert runs.records(name) < STEPS
    cluster.wait_for(job, "RUNNING", seconds=120, restarts=1)
    wait_until(lambda: len(runs.events(name, "begin")) == 2, 60, "second start", lambda: cluster.output(job))
    resumed = runs.events(name, "begin")[1]["step"]
    wait_until(lambda: (runs.folder(name).logs / f"{job}.1/rank_00000.log").exists(), 60, "ranks that are new")
    assert cluster.processes(node, RANK) == old
    for process in old:
        os.kill(process, signal.SIGCONT)
    wait_until(lambda: not cluster.processes(node, RANK), 30, "end of the old ranks", lambda: cluster.output(job))
    cluster.wait_for(job, "COMPLETED", seconds=180, restarts=1)
    runs.assert_same(name, calm)
    assert resumed >= 10
    logs = runs.folder(name).logs / f"{job}.0"
    left = [rank for rank in range(4) if "writes nothing more" in (logs / f"rank_{rank:05d}.log").read_text()]
    assert left, [path.read_text() for path in logs.iterdir()]
    records = [json.loads(path.read_text()) for path in sorted(logs.glob("rank_*.json"))]
    assert 77 in [record.get("code") for record in records]
    assert (runs.folder(name).path / ".incarnation").read_text() == f"{job}.1"


def test_fewer_nodes_after_a_crash(runs, calm):
    name = "fewer"
    layout_from_the_launcher = ("parallel.data_parallel_size=null",)
    options = ("--partition=pair", "--nodes=1-2", "--gpus-per-node=2")
    job = runs.train(name, *options, overrides=layout_from_the_launcher)
    runs.wait_for_step(name, job, MID_RUN)
    runs.cluster.crash("node2")
    runs.cluster.wait_for(job, "COMPLETED", seconds=240, restarts=1)
    first, second = runs.events(name, "begin")
    assert (first["nodes"], second["nodes"]) == (["node1", "node2"], ["node1"]) and second["step"] >= 10
    losses = [[record["loss"] for record in runs.metrics(one)] for one in (name, calm)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == STEPS
    assert "tensor-parallel 2 x data-parallel 1" in runs.cluster.output(job)
