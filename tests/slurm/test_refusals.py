"""What a job is refused for before its first step, each with one message that names the node and the way out."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import ROOT
from tests.slurm.runs import ONE_RANK_A_NODE, RECIPE, last_line

pytestmark = pytest.mark.slurm

OPTIONS, LAYOUT = ONE_RANK_A_NODE
CLOCK_AHEAD = "import time\nreal = time.time\ntime.time = lambda: real() + 100\n"


def refused(runs, name, *options, overrides=(), code=2):
    """The output of a job that ends with this exit code and trained nothing."""
    job = runs.train(name, *options, overrides=overrides)
    runs.cluster.wait_for(job, "FAILED", seconds=120)
    output = runs.cluster.output(job)
    assert runs.cluster.exit_code(job) == code and runs.records(name) == 0, output
    return output


def test_a_bad_recipe(runs):
    output = refused(runs, "bad", "--nodes=2", overrides=("model.num_layerz=2",))
    assert "num_layerz" in output and not (runs.folder("bad").path / "logs").exists()


def test_ranks_that_the_layout_cannot_use(runs):
    output = refused(runs, "layout", *OPTIONS, overrides=("parallel.data_parallel_size=2",))
    assert "needs 4 ranks, but 2 were started" in last_line(output)


def test_a_launcher_that_starts_a_world_on_each_node(runs):
    """The classic mistake: two nodes, and on each of them somebody trains alone."""
    launch = f"srun --ntasks-per-node=1 torchrun --standalone --nproc-per-node=1 -m pretrain train {RECIPE}"
    overrides = runs.overrides("alone", "parallel.tensor_model_parallel_size=1", "parallel.data_parallel_size=null")
    job = runs.cluster.submit("--nodes=2", "--wrap", " ".join((launch, *(f"'{one}'" for one in overrides))))
    runs.cluster.wait_for(job, "FAILED", seconds=120)
    output = runs.cluster.output(job)
    assert "but the SLURM job has 2 nodes" in output and runs.records("alone") == 0


def test_another_clock(runs, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(CLOCK_AHEAD)
    runs.cluster.run("node2", "mount", "--bind", str(tmp_path), str(runs.cluster.site))
    try:
        output = refused(runs, "clock", *OPTIONS, overrides=LAYOUT)
    finally:
        runs.cluster.run("node2", "umount", str(runs.cluster.site))
    assert "clocks differ by more than 5 s: node2 is 100." in output


def test_another_version(runs, tmp_path):
    text = (ROOT / "pretrain/__init__.py").read_text()
    version = text.split('"')[-2]
    (tmp_path / "init.py").write_text(text.replace(version, "0.0.1"))
    runs.cluster.run("node2", "mount", "--bind", str(tmp_path / "init.py"), str(ROOT / "pretrain/__init__.py"))
    try:
        output = refused(runs, "version", *OPTIONS, overrides=LAYOUT)
    finally:
        runs.cluster.run("node2", "umount", str(ROOT / "pretrain/__init__.py"))
    assert f"pretrain is 0.0.1 on node2, but {version} on node1" in output


def test_no_room_for_two_checkpoints(runs):
    """On the file system that the nodes share: seen before the first step."""
    disk = runs.cluster.disk
    fill = f"head -c 100m /dev/zero > {disk}/filler; truncate -s -500K {disk}/filler"
    runs.cluster.run("node1", "sh", "-c", fill)
    try:
        output = refused(runs, "no_room", *OPTIONS, overrides=(*LAYOUT, f"output_root={disk}"))
    finally:
        runs.cluster.run("node1", "rm", f"{disk}/filler")
    assert f"{disk}/no_room has" in output and "free on its disk" in output
