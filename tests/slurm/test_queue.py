"""What SLURM makes of our jobs: chains, arrays of runs, a job that gets nowhere, ``pretrain submit``, eight nodes."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.slurm.runs import MID_RUN, RECIPE, STEPS, last_line
from tests.slurm.waiting import wait_until

pytestmark = pytest.mark.slurm

ONE_RANK = ("--nodes=1", "--gpus-per-node=1")
LAYOUT = ("parallel.tensor_model_parallel_size=1", "parallel.data_parallel_size=1")


def test_a_chain(runs):
    """``--array=1-3%1`` of jobs that are not put back: each goes on where the one before it stopped."""
    name, steps = "chain", 400  # of a hundredth of a second
    more = (f"batch.train_steps={steps}", "checkpoint.every_steps=0")
    job = runs.train(name, *ONE_RANK, "--array=1-3%1", "--no-requeue", overrides=(*LAYOUT, *more))
    runs.wait_for_step(name, job, MID_RUN)
    # SLURM 22.05 signals it and answers "try again later": scancel does, when the job is over.
    runs.cluster.client("scancel", "--signal=USR1", f"{job}_1", check=False)
    runs.cluster.wait_for(job, "COMPLETED", "FAILED", seconds=180)
    states = {one["ArrayTaskId"]: (one["JobState"], one["ExitCode"]) for one in runs.cluster.jobs(job)}
    assert states == {"1": ("FAILED", "75:0"), "2": ("COMPLETED", "0:0"), "3": ("COMPLETED", "0:0")}
    actions = [(event["action"], event["step"]) for event in runs.events(name, "end")]
    stopped = actions[0][1]
    assert actions == [("stopped", stopped), ("done", steps), ("done", steps)] and MID_RUN <= stopped < steps
    assert [event["step"] for event in runs.events(name, "begin")] == [0, stopped, steps]
    assert [record["step"] for record in runs.metrics(name)] == list(range(1, steps + 1))


def test_a_job_that_gets_nowhere(runs):
    """Asked to stop before its first step each time: it says so after the second start, and is not put back again."""
    name = "nowhere"
    job = runs.train(name, *ONE_RANK, overrides=LAYOUT)
    for restart in (0, 1):
        ready = runs.folder(name).logs / f"{job}.{restart}/rank_00000.json"
        wait_until(ready.exists, 90, "rank", lambda: runs.cluster.output(job))
        runs.cluster.client("scancel", "--signal=USR1", job)
    runs.cluster.wait_for(job, "FAILED", seconds=90, restarts=1)
    assert runs.cluster.exit_code(job) == 1 and runs.records(name) == 0
    assert [event["action"] for event in runs.events(name, "end")] == ["requeued", "failed"]
    starts = f"no progress in 2 starts in a row ({job}.0, {job}.1): all began at step 0"
    assert starts in last_line(runs.cluster.output(job))


def test_an_array_of_runs(runs, tmp_path):
    """A study of three, two at a time, and one of them cannot be trained."""
    file = tmp_path / "study.txt"
    changes = [
        ("objective.method=agg",),
        ("objective.method=nonsense",),
        ("objective.method=mle", "objective.alpha=null"),
    ]
    lines = [
        shlex.join([RECIPE, *runs.overrides(f"study_{index}", *LAYOUT, *change)])
        for index, change in enumerate(changes, start=1)
    ]
    file.write_text("# three runs\n\n" + "\n".join(lines) + "\n")
    job = runs.cluster.submit("--array=1-3%2", *ONE_RANK, "slurm/study.sbatch", str(file))
    runs.cluster.wait_for(job, "COMPLETED", "FAILED", seconds=240)
    tasks = {one["ArrayTaskId"]: one for one in runs.cluster.jobs(job)}
    assert [tasks[index]["JobState"] for index in "123"] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert tasks["2"]["ExitCode"] == "2:0" and tasks["1"]["ArrayTaskThrottle"] == "2"
    assert max(together(list(tasks.values()))) <= 2
    for index in "13":
        assert len(runs.metrics(f"study_{index}")) == STEPS and runs.folder(f"study_{index}").evaluation_file.exists()
    assert runs.metrics("study_1")[-1]["loss"] != runs.metrics("study_3")[-1]["loss"]
    assert not runs.folder("study_2").path.exists()


def test_an_evaluation_that_runs_out_of_time(runs, tmp_path):
    """The signal before the time limit ends it; the job starts again, finds its training done, and evaluates."""
    name, file = "evaluated_twice", tmp_path / "study.txt"
    file.write_text(shlex.join([RECIPE, *runs.overrides(name, *LAYOUT)]) + "\n")
    job = runs.cluster.submit("--array=1-1", *ONE_RANK, "slurm/study.sbatch", str(file))
    logs = runs.folder(name).logs
    begun = wait_until(
        lambda: list(logs.glob("*.0.evaluate-*/rank_00000.json")), 120, "rank", lambda: runs.cluster.output(job)
    )
    runs.cluster.client("scancel", "--batch", "--signal=USR1", f"{job}_1", check=False)
    runs.cluster.wait_for(job, "COMPLETED", seconds=180, restarts=1)
    first = logs / begun[0].parent.name
    again = logs / first.name.replace(".0.", ".1.")
    assert again.is_dir() and runs.folder(name).evaluation_file.exists()
    assert [event["action"] for event in runs.events(name, "end")] == ["done", "done"]
    assert "requeued: interrupted (SIGUSR1)" in runs.cluster.output(job)


def test_the_time_is_over_between_two_steps_of_the_last_of_an_array(runs, tmp_path):
    """SLURM warns the shell alone, once, and of the array's number it knows several jobs: this one is put back."""
    names, file, waits = ("of_array_1", "of_array_2"), tmp_path / "study.txt", tmp_path / "waits"
    file.write_text("".join(shlex.join([RECIPE, *runs.overrides(name, *LAYOUT)]) + "\n" for name in names))
    python = tmp_path / "python"
    slow = f'[[ "$*" != *study.job\\ steps*{names[1]} || -e {waits} ]] || {{ touch {waits}; sleep 15; }}'
    python.write_text(f'#!/bin/bash\n{slow}\nexec python "$@"\n')
    python.chmod(0o755)
    job = runs.cluster.submit("--array=1-2", *ONE_RANK, "slurm/study.sbatch", str(file), PYTHON=str(python))
    wait_until(waits.exists, 120, "a job between two steps", lambda: runs.cluster.output(f"{job}_2"))
    assert runs.cluster.jobs(f"{job}_2")[0]["JobId"] == job
    runs.cluster.client("scancel", "--batch", "--signal=USR1", f"{job}_2", check=False)
    runs.cluster.wait_for(f"{job}_2", "COMPLETED", seconds=180, restarts=1)
    runs.cluster.wait_for(f"{job}_1", "COMPLETED", seconds=30)
    assert [runs.cluster.jobs(f"{job}_{index}")[0]["Restarts"] for index in "12"] == ["0", "1"]
    assert "requeued: interrupted (SIGUSR1)" in runs.cluster.output(f"{job}_2")
    assert not list(runs.folder(names[1]).logs.glob("*.0.evaluate-*/rank_*"))  # none was started for nothing
    assert all(runs.folder(name).evaluation_file.exists() for name in names)


def test_reshard_in_a_job(runs, calm):
    """It may write to a run that an earlier job has trained."""
    folder = runs.folder(calm)
    runs.cluster.client("cp", "-r", str(folder.path), str(runs.folder("resharded").path))
    run = str(runs.folder("resharded").path)
    layout = ("parallel.sharding=zero3", *LAYOUT)
    job = runs.cluster.submit(*ONE_RANK, "--time=30", "slurm/launch.sh", "checkpoint", "reshard", run, *layout)
    runs.cluster.wait_for(job, "COMPLETED", seconds=120)
    assert "tensor-parallel 1 x data-parallel 1 now; the one before is kept in" in runs.cluster.output(job)
    assert "all valid" in runs.cluster.client("python", "-m", "pretrain", "checkpoint", "verify", run)


def together(jobs):
    """How many ran at the start of each."""
    return [sum(one["StartTime"] <= other["StartTime"] < one["EndTime"] for one in jobs) for other in jobs]


def test_submit(runs, calm):
    """``pretrain submit`` on the login host: the job that it writes trains the same, and ``status`` knows it."""
    arguments = [RECIPE, *runs.overrides("submitted")]
    options = ("--nodes", "2", "--gpus-per-node", "2", "--time", "0:30:00")
    said = runs.cluster.client("python", "-m", "pretrain", "submit", *arguments, *options)
    job = re.search(r"job (\d+) on 2 node", said)[1]
    runs.cluster.wait_for(job, "COMPLETED", seconds=180)
    runs.assert_same("submitted", calm)
    [event] = runs.events("submitted", "submit")
    assert (event["job_id"], event["nodes"], event["gpus_per_node"]) == (job, 2, 2)
    table = runs.cluster.client("python", "-m", "pretrain", "status", str(runs.folder("submitted").path))
    assert re.search(rf"submitted .*done.* {STEPS}", table), table


def test_eight_nodes(runs):
    """One rank each; the all-reduce of the preflight and of every step goes over all of them."""
    options = ("--nodes=8", "--gpus-per-node=1", "--time=30")
    layout = ("parallel.tensor_model_parallel_size=1", "parallel.data_parallel_size=8", "batch.micro_batch_size=1")
    job = runs.train("eight", *options, overrides=(*layout, "batch.train_steps=8"))
    runs.cluster.wait_for(job, "COMPLETED", seconds=240)
    [begin] = runs.events("eight", "begin")
    assert begin["nodes"] == runs.cluster.nodes
    assert "preflight: 8 ranks on 8 node(s)" in runs.cluster.output(job)
    assert len(runs.metrics("eight")) == 8
