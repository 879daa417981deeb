"""A study as one array job: what is handed to sbatch, what the jobs say, what is refused."""

from __future__ import annotations

import shlex

import pytest

from pretrain.__main__ import main
from pretrain.cluster.batch import ENDING
from pretrain.cluster.job_script import ROOT
from pretrain.files import write_json
from pretrain.recipe_io import load_recipe
from pretrain.run_folder import RunFolder
from pretrain.study import job
from pretrain.study.state import RunState, read_state, write_state
from pretrain.study.study_file import load_study
from pretrain.study.study_folder import StudyFolder
from tests.cluster.fake_slurm import FakeSlurm, take_away
from tests.study.studies import OBJECTIVES, write_study


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    for name in ("RANKS_PER_NODE", "PRETRAIN_CLUSTER_ENV", "SBATCH_PARTITION"):
        monkeypatch.delenv(name, raising=False)
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def study(prepared_recipe, tmp_path):
    return write_study(tmp_path, prepared_recipe, axes={"objective": OBJECTIVES, "seed": [1, 2]})


def test_one_array_with_a_line_for_each_run(study, slurm, capfd):
    options = ["--nodes", "2", "--throttle", "3", "--time", "60", "--sbatch-option=--exclude=node7"]
    assert main(["study", study, "--slurm", *options]) == 0
    folder = StudyFolder(load_study(study).folder)
    [script] = slurm.scripts
    for line in ("--array=1-4%3", "--nodes=2", "--time=60", "--exclude=node7", "--job-name=small"):
        assert f"#SBATCH {line}" in script.splitlines()
    last = shlex.split(script.splitlines()[-1])
    assert f"cd {ROOT}" in script and last == ["exec", "bash", "slurm/study.sbatch", str(folder.lines_file)]
    lines = [line for line in folder.lines_file.read_text().splitlines() if not line.startswith("#")]
    recipes = [load_recipe(*shlex.split(line)) for line in lines]
    assert [recipe.name for recipe in recipes] == ["plain-seed1", "plain-seed2", "agg-seed1", "agg-seed2"]
    assert all(recipe.run_folder == folder.path / recipe.name for recipe in recipes)
    assert {read_state(recipe.run_folder).state for recipe in recipes} == {"planned"}
    assert "job 101, 4 run(s) of 4 on 2 node(s) each" in capfd.readouterr().out


def test_only_what_is_left_is_submitted_again(study, slurm, capfd):
    assert main(["study", study, "--slurm"]) == 0
    slurm.queue("105|101|RUNNING|1:00|node1|None")
    assert main(["study", study, "--slurm"]) == 2
    assert "has a job, 101 (running): wait for it, or scancel 101" in capfd.readouterr().err
    assert main(["study", study]) == 2  # nor may it be run here
    slurm.queue()
    folder = StudyFolder(load_study(study).folder)
    write_state(folder.path / "agg-seed1", RunState(), "failed", "exit code 1: no reason")
    write_state(folder.path / "agg-seed2", RunState(), "running")
    assert main(["study", study, "--slurm"]) == 0
    assert "agg-seed1 failed before, and is tried again: exit code 1: no reason" in capfd.readouterr().out
    assert "--array=1-4\n" in slurm.scripts[1]
    assert read_state(folder.path / "agg-seed2").state == "preempted"


def test_refusals_of_the_cluster(study, slurm, capfd, tmp_path, monkeypatch):
    slurm.refuse("sbatch: error: invalid partition\n")
    assert main(["study", study, "--slurm"]) == 2
    assert "sbatch refused: invalid partition" in capfd.readouterr().err
    take_away(monkeypatch, tmp_path / "bin")
    assert main(["study", study, "--slurm"]) == 2
    assert "submit on a login node" in capfd.readouterr().err


def test_what_jobs_say(study, slurm, tmp_path, monkeypatch):
    assert main(["study", study, "--slurm"]) == 0
    run = RunFolder(load_study(study).folder / "agg-seed1")
    monkeypatch.setenv("SLURM_JOB_ID", "105")
    assert job.main(["begin", str(run.path)]) == 0
    state = read_state(run.path)
    assert (state.state, state.job_id) == ("running", "105") and state.process
    assert job.main(["end", str(run.path), "75"]) == 0
    assert read_state(run.path).state == "preempted"
    for start, code, reason in (
        ("104.0", 70, "of another job"),
        ("105.0.evaluate-6", 70, "rank 0 on node1: hangs"),
        ("105.1.evaluate-6", 70, "of a later start"),
    ):
        (run.logs / start).mkdir(parents=True)
        write_json(run.logs / start / ENDING, {"code": code, "reason": reason})
    assert job.main(["end", str(run.path), "70"]) == 0
    state = read_state(run.path)
    assert (state.state, state.failures, state.cause) == ("failed", 1, "exit code 70: rank 0 on node1: hangs")
    assert job.main(["end", str(run.path), "2"]) == 0  # what failed has said nothing
    assert read_state(run.path).cause == "exit code 2"
    assert job.main(["begin", str(tmp_path / "no study")]) == 0 and not (tmp_path / "no study").exists()


def test_a_job_that_ends_well(prepared_recipe, slurm, tmp_path, capfd):
    """Trained and evaluated as the job does it: the state says done, and the records have the run."""
    from pretrain.study.records import read_records

    study = write_study(tmp_path, prepared_recipe, axes={"objective": OBJECTIVES})
    assert main(["study", study, "--slurm"]) == 0
    folder = StudyFolder(load_study(study).folder)
    run = folder.run("plain")
    assert job.main(["begin", str(run.path)]) == 0
    assert main(["train", str(folder.recipe_file("plain"))]) == 0
    capfd.readouterr()
    assert job.main(["steps", str(run.path)]) == 0
    assert capfd.readouterr().out == "6\n"
    assert job.main(["end", str(run.path), "0"]) == 0
    assert read_state(run.path).state == "failed"  # it was not evaluated
    assert main(["evaluate", str(run.path), "--checkpoint", "6"]) == 0
    assert job.main(["end", str(run.path), "0"]) == 0
    assert read_state(run.path).state == "done"
    assert [row["run"] for row in read_records(folder.path).to_pylist()] == ["plain"]
    assert main(["study", study, "--slurm"]) == 0
    assert "#SBATCH --array=1-1\n" in slurm.scripts[1] and "agg.yaml" in folder.lines_file.read_text()
