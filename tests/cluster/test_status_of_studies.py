"""``pretrain status`` of studies: their runs have a row each, whether they have begun or not."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from pretrain.__main__ import main
from tests.cluster.fake_slurm import FakeSlurm, take_away
from tests.cluster.test_status import BEGIN, end, write_run

TIME = "2026-01-02T03:04:05+00:00"
LATER = "2026-01-02T03:04:06+00:00"
ARRAY = {"event": "submit", "time": TIME, "job_id": "101", "runs": ["new", "old"], "nodes": 1}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def make_run(tmp_path):
    return functools.partial(write_run, tmp_path / "runs")


@pytest.fixture
def rows_of(capfd):
    def ask(folder: Path) -> list[dict[str, object]]:
        capfd.readouterr()
        assert main(["status", str(folder), "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    return ask


@pytest.fixture
def make_study(make_run):
    """A study of the runs ``new``, of which it has a state alone, and ``old``, which has begun, and is made by hand."""

    def make(new: dict[str, object] | None = None, events: object = (ARRAY,)) -> Path:
        study = make_run("s/new").parent
        (study / "recipes").mkdir()
        (study / "new/recipe.yaml").rename(study / "recipes/new.yaml")
        (study / "plan.json").write_text(json.dumps({"format": 1, "study": "s", "runs": {"new": {}, "old": {}}}))
        (study / "jobs.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        if new is None:
            (study / "new").rmdir()
        else:
            say_state(study / "new", **new)
        return study

    return make


def say_state(run: Path, **said: object) -> None:
    (run / "state.json").write_text(json.dumps({"format": 1, **said}))


PLANNED = {"state": "planned", "since": TIME}
RUNNING = {"state": "running", "since": LATER, "job_id": "103", "host": "node1", "process": 5}


@pytest.mark.parametrize(
    ("queue", "said", "events", "state", "reason"),
    [
        ("101|101|PENDING|0:00||Priority", PLANNED, [ARRAY], "pending", "Priority"),
        ("101|101|PENDING|0:00||Priority", None, [ARRAY], "pending", "Priority"),
        (
            "101|101|PENDING|0:00||Priority", {"state": "failed", "cause": "x", "since": TIME}, [ARRAY],
            "pending", "Priority",  # it is tried again
        ),
        (
            "101|101|PENDING|0:00||Priority", {"state": "failed", "cause": "exit code 70: x", "since": LATER}, [ARRAY],
            "failed", "exit code 70: x",  # by this array, of which other runs wait
        ),
        ("102|101|RUNNING|0:01|node1|None", PLANNED, [ARRAY], "pending", "other jobs of the array 101 run"),
        ("101|101|CANCELLED|0:00||None", PLANNED, [ARRAY], "stopped", "job 101 was cancelled"),
        ("", PLANNED, [ARRAY], "failed", "job 101 left the queue before it began"),
        ("101|101|PENDING|0:00||Priority", PLANNED, [ARRAY | {"runs": ["old"]}], "planned", ""),
        ("", PLANNED, [], "planned", ""),
        ("", None, [], "planned", ""),
        ("", {"state": "preempted", "cause": "SIGTERM", "since": LATER}, [ARRAY], "preempted", "SIGTERM"),
        ("103|101|RUNNING|0:09|node1|None", RUNNING, [ARRAY], "running", "running on node1 for 0:09"),
        ("103|101|PENDING|0:00||BeginTime", RUNNING, [ARRAY], "requeued", "BeginTime"),
        ("103|101|NODE_FAIL|0:09|node1|None", RUNNING, [ARRAY], "failed", "job 103 ended without a word: node_fail"),
    ],
)  # fmt: skip
def test_states_of_a_run_that_its_study_has_not_begun(slurm, make_study, rows_of, queue, said, events, state, reason):
    slurm.queue("7|7|PENDING|0:00||Dependency", queue)
    row = rows_of(make_study(said, events))[0]
    assert (Path(row["run"]).name, row["state"]) == ("new", state)
    assert row["reason"].startswith(reason) and bool(row["reason"]) == bool(reason)
    assert (row["step"], row["train_steps"]) == (0, 100)


def test_a_study_is_searched_for_its_runs(slurm, make_study, make_run, capfd, monkeypatch):
    study = make_study(PLANNED)
    old = make_run("s/old", steps=(100,), records=100, events=[BEGIN | {"job_id": "102"}])
    say_state(old, state="done", since=LATER)
    make_run("alone", records=3)
    slurm.queue("101|101|PENDING|0:00||JobArrayTaskLimit")
    monkeypatch.chdir(study.parent.parent)
    assert main(["status"]) == 0
    _, *lines = capfd.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["runs/alone", "stopped", "3/100"],
        ["runs/s/new", "pending", "0/100"],
        ["runs/s/old", "done", "100/100"],
    ]
    assert main(["status", "runs/s/new", "runs/s/old", "runs/s"]) == 0  # each once
    assert [line.split()[:2] for line in capfd.readouterr().out.splitlines()[1:]] == [
        ["runs/s/new", "pending"],
        ["runs/s/old", "done"],
    ]
    monkeypatch.chdir("runs/s/new")
    assert main(["status", "."]) == 0
    assert "pending" in capfd.readouterr().out


def test_a_run_of_a_study_is_done_when_it_is_evaluated(slurm, make_study, make_run, rows_of):
    make_study(PLANNED)
    run = make_run("s/old", steps=(100,), records=100, events=[BEGIN, end("done", "")])
    say_state(run, state="failed", since=LATER, cause="exit code 1: no room")
    (row,) = rows_of(run)
    assert (row["state"], row["reason"], row["step"]) == ("failed", "exit code 1: no room", 100)
    say_state(run, state="running", since=LATER, host=socket.gethostname(), process=os.getpid())
    assert rows_of(run)[0]["state"] == "running"
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    say_state(run, state="running", since=LATER, host=socket.gethostname(), process=gone.pid)
    (row,) = rows_of(run)
    assert row["state"] == "stopped" and "its runner, process" in row["reason"]
    say_state(run, state="done", since=LATER)
    assert rows_of(run)[0]["state"] == "done"


def test_a_study_without_squeue(make_study, tmp_path, monkeypatch, rows_of):
    take_away(monkeypatch, tmp_path / "bin")
    study = make_study(PLANNED)
    for said, state, reason in (
        (PLANNED, "pending", "as it was submitted: no squeue here to ask"),
        (RUNNING, "running", "process 5 on node1, as it said: no squeue here to ask"),
    ):
        say_state(study / "new", **said)
        row = rows_of(study)[0]
        assert (row["state"], row["reason"]) == (state, reason)


def test_a_damaged_study(slurm, make_study, make_run, rows_of):
    study = make_study(PLANNED)
    (make_run("s/old", steps=(50,)) / "recipe.yaml").unlink()
    (study / "recipes/new.yaml").write_text("{")
    new, old = rows_of(study)
    assert new["reason"].endswith("recipes/new.yaml of the study cannot be read") and new["train_steps"] is None
    assert (old["state"], old["reason"]) == ("damaged", "no recipe.yaml")
    (study / "plan.json").write_text('{"runs": ')
    assert [Path(row["run"]).name for row in rows_of(study)] == ["new", "old"]
