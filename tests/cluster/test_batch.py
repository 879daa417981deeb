"""Before and after the ranks of a job, with SLURM's commands played by a script."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pretrain.cluster import batch
from pretrain.cluster.job import read_events, record_event

RUN = ["train", "quickstart_plain"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A job of two nodes; returns the file that lists the commands given to SLURM."""
    programs, asked = tmp_path / "bin", tmp_path / "asked"
    programs.mkdir()
    answers = {"scontrol": 'case "$2" in hostnames) echo node1; echo node2;; *) echo "Requeue=1 Restarts=0 ";; esac'}
    answers["scontrol"] = answers["scontrol"].replace('"Requeue', '"   Requeue')
    for name, answer in {"squeue": "cat $STATE_FILE", **answers}.items():
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {asked}\n{answer}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "state").write_text("7 RUNNING\n")
    for name, value in {
        "STATE_FILE": str(tmp_path / "state"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "PRETRAIN_WORLD_SIZE": "2",
        "PRETRAIN_INCARNATION": "7.0",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(batch, "RETRY_SECONDS", 0.01)
    return asked


@pytest.fixture
def arguments(tmp_path):
    return [*RUN, f"output_root={tmp_path}/runs", "name=x"]


def begin(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Path:
    assert batch.main(["begin", *arguments]) == 0
    return Path(capsys.readouterr().out.splitlines()[-1])


def ranks_end(logs: Path, code: int, **facts: object) -> None:
    for rank in range(2):
        record = {"rank": rank, "host": "node1", "code": code, "reason": "", "ended": 1.0} | facts
        (logs / f"rank_{rank:05d}.json").write_text(json.dumps(record))


def save(logs: Path, step: int) -> None:
    (logs.parent.parent / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


def test_begin_and_done(slurm, arguments, capsys):
    logs = begin(arguments, capsys)
    run = logs.parent.parent
    assert logs.name == "7.0" and (run / ".incarnation").read_text() == "7.0"
    ranks_end(logs, 0)
    save(logs, 10)
    assert batch.main(["end", str(logs), "0"]) == 0
    assert capsys.readouterr().out == "job 7.0 done at step 10\n"
    first, last = read_events(run / "jobs.jsonl")
    assert (first["event"], first["nodes"], first["step"]) == ("begin", ["node1", "node2"], 0)
    assert (last["event"], last["action"], last["step"], last["code"]) == ("end", "done", 10, 0)
    assert "requeue" not in slurm.read_text()


def test_the_time_is_nearly_over(slurm, arguments, capsys):
    logs = begin(arguments, capsys)
    ranks_end(logs, 75, stopped_by=["SIGUSR1"])
    save(logs, 10)
    assert batch.main(["end", str(logs), "0"]) == 75
    assert slurm.read_text().splitlines()[-1] == "scontrol requeue 7"
    assert "requeued at step 10" in capsys.readouterr().out


def test_the_last_task_of_an_array_speaks_of_itself_alone(slurm, arguments, capsys, tmp_path, monkeypatch):
    """SLURM gives it the number of the array, of which squeue lists all tasks, and scontrol requeues all."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    (tmp_path / "state").write_text("8 COMPLETED\n7 RUNNING\n9 RUNNING\n")
    logs = begin(arguments, capsys)
    ranks_end(logs, 75, stopped_by=["SIGUSR1"])
    save(logs, 10)
    assert batch.main(["end", str(logs), "0"]) == 75
    assert slurm.read_text().splitlines()[-2:] == ["scontrol show job 7_3", "scontrol requeue 7_3"]


def mute(tmp_path, name, first_word, times):
    """The next answers of a program of SLURM's to such calls are errors."""
    program = tmp_path / "bin" / name
    body = program.read_text().split("\n", 1)[1]
    words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    (tmp_path / "mute").write_text("x\n" * times)
    mute = f"[ $1 = {first_word} -a -s {tmp_path}/mute ] && sed -i 1d {tmp_path}/mute && echo '{words}' >&2 && exit 1"
    program.write_text(f"#!/bin/sh\n{mute}\n{body}")


@pytest.mark.parametrize(("name", "first_word"), [("squeue", "--noheader"), ("scontrol", "requeue")])
def test_a_controller_that_is_busy_is_asked_again(slurm, arguments, capsys, tmp_path, name, first_word):
    logs = begin(arguments, capsys)
    ranks_end(logs, 75, stopped_by=["SIGUSR1"])
    mute(tmp_path, name, first_word, 3)
    assert batch.main(["end", str(logs), "0"]) == 75
    assert slurm.read_text().splitlines()[-1] == "scontrol requeue 7"
    assert capsys.readouterr().out.count("requeued at step 0") == 1


@pytest.mark.parametrize(("name", "first_word"), [("squeue", "--noheader"), ("scontrol", "requeue")])
def test_a_controller_that_is_gone(slurm, arguments, capsys, tmp_path, monkeypatch, name, first_word):
    """How it ended is told and recorded all the same."""
    monkeypatch.setattr(batch, "ANSWER_SECONDS", 0.1)
    logs = begin(arguments, capsys)
    ranks_end(logs, 75, stopped_by=["SIGUSR1"])
    mute(tmp_path, name, first_word, 1000)
    assert batch.main(["end", str(logs), "0"]) == 75
    out = capsys.readouterr().out
    assert "stopped at step 0: stopped as asked (SIGUSR1) and saved; not put back into the queue" in out
    last = read_events(logs.parent.parent / "jobs.jsonl")[-1]
    assert (last["event"], last["action"]) == ("end", "stopped") and "Unable to contact" in last["reason"]
    assert json.loads((logs / batch.ENDING).read_text())["reason"] == last["reason"]


@pytest.mark.parametrize(
    ("causes", "state"),
    [(["SIGTERM"], "RUNNING"), (["SIGUSR1", "STOP"], "RUNNING"), (["STOP"], "RUNNING"), (["SIGUSR1"], "CANCELLED")],
)
def test_what_was_stopped_by_somebody_stays_stopped(slurm, arguments, capsys, tmp_path, causes, state):
    logs = begin(arguments, capsys)
    ranks_end(logs, 75, stopped_by=causes)
    save(logs, 10)
    (tmp_path / "state").write_text(f"7 {state}\n")
    assert batch.main(["end", str(logs), "0"]) == 75
    assert "requeue 7" not in slurm.read_text() and " stopped at step 10" in capsys.readouterr().out


def test_a_job_that_may_not_be_requeued(slurm, arguments, capsys, tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(scontrol.read_text().replace("Requeue=1", "Requeue=0"))
    logs = begin(arguments, capsys)
    ranks_end(logs, 75, stopped_by=["SIGUSR1"])
    assert batch.main(["end", str(logs), "0"]) == 75
    assert "requeue 7" not in slurm.read_text()


def test_no_progress_twice_in_a_row(slurm, arguments, capsys, monkeypatch):
    for restarts in range(2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        logs = begin(arguments, capsys)
        ranks_end(logs, 75, stopped_by=["SIGUSR1"])
        code = batch.main(["end", str(logs), "0"])
        assert code == (75, 1)[restarts]
    assert slurm.read_text().count("requeue 7") == 1
    assert "no progress in 2 starts in a row (7.0, 7.1): all began at step 0" in capsys.readouterr().out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")  # SLURM itself starts it again: a node was lost
    assert batch.main(["begin", *arguments]) == 1
    assert "no progress" in capsys.readouterr().err
    last = read_events(logs.parent.parent / "jobs.jsonl")[-1]
    assert (last["event"], last["action"], last["incarnation"]) == ("end", "failed", "7.2")
    assert "no progress in 2 starts in a row (7.0, 7.1)" in last["reason"]
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # submitted by somebody who has put it right
    begin(arguments, capsys)


def test_progress_is_counted_for_a_chain_of_jobs(slurm, arguments, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    for job_id in ("5", "6"):
        monkeypatch.setenv("SLURM_JOB_ID", job_id)
        logs = begin(arguments, capsys)
    save(logs, 4)
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # the third start, and the second began at step 0 as the first did
    assert batch.main(["begin", *arguments]) == 0
    assert "incarnation 6.0 on node1, node2 ended without a word" in capsys.readouterr().err


def test_a_failure_is_named_and_not_started_again(slurm, arguments, capsys):
    logs = begin(arguments, capsys)
    ranks_end(logs, 70, reason="rank 0 hangs: no end of step 3 after 60 s")
    assert batch.main(["end", str(logs), "70"]) == 70
    assert "failed at step 0: rank 0 on node1: rank 0 hangs" in capsys.readouterr().out
    assert "requeue 7" not in slurm.read_text()


def test_bad_input_is_refused_before_any_rank_starts(slurm, arguments, capsys, monkeypatch):
    assert batch.main(["begin", *arguments, "batch.train_steps=-1"]) == 2
    assert "batch.train_steps" in capsys.readouterr().err
    monkeypatch.delenv("SLURM_JOB_ID")
    assert batch.main(["begin", *arguments]) == 2
    assert "not set: this runs inside a SLURM job" in capsys.readouterr().err


def test_other_verbs_take_nothing_over(slurm, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    logs = begin(["evaluate", str(run)], capsys)
    ranks_end(logs, 0)
    assert batch.main(["end", str(logs), "0"]) == 0
    assert capsys.readouterr().out == "job 7.0 done\n"
    assert not (run / ".incarnation").exists() and not (run / "jobs.jsonl").exists()


def test_an_evaluation_that_runs_out_of_time_starts_again(slurm, arguments, capsys, tmp_path):
    save(begin(arguments, capsys), 500)
    run = tmp_path / "runs" / "x"
    logs = begin(["evaluate", str(run)], capsys)
    for number in range(2):
        (logs / f"rank_{number:05d}.json").write_text(json.dumps({"rank": number, "host": "node1"}))
    assert batch.main(["end", str(logs), "138"]) == 75
    assert slurm.read_text().splitlines()[-1] == "scontrol requeue 7"
    assert capsys.readouterr().out == "job 7.0 requeued: interrupted (SIGUSR1)\n"


def test_an_evaluation_that_never_has_time_enough(slurm, capsys, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    for restarts in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        logs = begin(["evaluate", str(run)], capsys)
        assert batch.main(["end", str(logs), "138"]) == (75, 75, 1)[restarts]
    assert slurm.read_text().count("requeue 7") == 2
    assert "interrupted (SIGUSR1); in 3 starts of the job it was not done" in capsys.readouterr().out


def test_evaluations_of_several_checkpoints_are_counted_apart(slurm, capsys, tmp_path, monkeypatch):
    """A study's job evaluates one after the other, and each start may get through some of them."""
    run = tmp_path / "run"
    run.mkdir()
    for restarts in range(4):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        done = begin(["evaluate", str(run), "--checkpoint", str(10 + restarts)], capsys)
        ranks_end(done, 0)
        assert batch.main(["end", str(done), "0"]) == 0
        interrupted = begin(["evaluate", str(run), "--checkpoint", str(11 + restarts)], capsys)
        assert interrupted.name == f"7.{restarts}.evaluate-{11 + restarts}"
        assert batch.main(["end", str(interrupted), "138"]) == 75


def test_reshard_takes_the_run_over(slurm, tmp_path, capsys):
    """It writes a checkpoint, which only the incarnation that has the run may."""
    run = tmp_path / "run"
    run.mkdir()
    logs = begin(["checkpoint", "reshard", str(run), "parallel.sharding=zero3"], capsys)
    assert logs.name == "7.0.checkpoint" and (run / ".incarnation").read_text() == "7.0"
    assert not (run / "jobs.jsonl").exists()


@pytest.mark.parametrize(("options", "saved"), [([], 500), (["--stop-at-step", "20"], 20)])
def test_jobs_of_a_chain_that_find_the_run_done_are_not_stuck(slurm, arguments, capsys, monkeypatch, options, saved):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    arguments = [*arguments, "batch.train_steps=500", *options]
    for job_id in ("5", "6", "7", "8"):
        monkeypatch.setenv("SLURM_JOB_ID", job_id)
        logs = begin(arguments, capsys)
        ranks_end(logs, 0)
        if job_id == "5":
            save(logs, saved)
        assert batch.main(["end", str(logs), "0"]) == 0
        assert " done at step" in capsys.readouterr().out


def test_events_survive_a_torn_line(tmp_path):
    file = tmp_path / "jobs.jsonl"
    record_event(file, "begin", step=0)
    with file.open("a") as stream:
        stream.write('{"event": "en')
    assert [event["event"] for event in read_events(file)] == ["begin"]


def test_a_lost_node_starts_the_job_again(slurm, arguments, capsys):
    logs = begin(arguments, capsys)
    ranks_end(logs, 1, reason="RuntimeError: Connection reset by peer")
    (logs / "rank_00001.json").write_text('{"rank": 1, "host": "node2"}')
    assert batch.main(["end", str(logs), "1"]) == 75
    assert slurm.read_text().splitlines()[-1] == "scontrol requeue 7"
    assert "requeued at step 0: contact lost with node2" in capsys.readouterr().out
