"""``pretrain status``: the state of a run from what it wrote and what squeue says; nothing makes it fail."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pretrain.__main__ import main
from pretrain.cluster.run_records import TAIL_BYTES, tail_records
from pretrain.recipe_io import recipe_to_dict
from tests.cluster.fake_slurm import FakeSlurm, take_away
from tests.small_runs import change, small_recipe

ROOT = Path(__file__).resolve().parents[2]
SUBMIT = {"event": "submit", "job_id": "101", "nodes": 2}
BEGIN = {"event": "begin", "job_id": "101", "incarnation": "101.0", "restarts": 0, "nodes": ["node1"], "step": 0}


def end(action: str, reason: str, **facts: object) -> dict[str, object]:
    return {"event": "end", "job_id": "101", "incarnation": "101.0", "action": action, "reason": reason} | facts


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


def write_run(
    runs: Path, name: str = "a", steps: tuple[int, ...] = (), records: int = 0, events: object = (), **files: str
) -> Path:
    """A run folder with what is asked for."""
    folder = runs / name
    folder.mkdir(parents=True)
    recipe = change(small_recipe(Path("text"), Path("data")), name=Path(name).name, batch={"train_steps": 100})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    for step in steps:
        (folder / f"checkpoints/step_{step:08d}").mkdir(parents=True)
        (folder / f"checkpoints/step_{step:08d}/MANIFEST.json").write_text("{}")
    lines = [{"step": step, "loss": 9 - step / 100, "tokens_per_second": 5e6} for step in range(1, records + 1)]
    if records:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if events:
        (folder / "jobs.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture
def make_run(tmp_path):
    return functools.partial(write_run, tmp_path / "runs")


@pytest.fixture
def row_of(capfd):
    def ask(folder: Path) -> dict[str, object]:
        capfd.readouterr()
        assert main(["status", str(folder), "--json"]) == 0
        (row,) = json.loads(capfd.readouterr().out)
        return row

    return ask


@pytest.mark.parametrize(
    ("queue", "events", "state", "reason"),
    [
        ("101|101|PENDING|0:00||Resources", [SUBMIT], "pending", "Resources"),
        ("101|101|RUNNING|1:02|node[1-2]|None", [SUBMIT], "running", "running on node[1-2] for 1:02"),
        ("101|101|RUNNING|1:02|node3|None", [SUBMIT, BEGIN], "running", "running on node3 for 1:02"),
        ("101|101|COMPLETING|1:02|node3|None", [SUBMIT, BEGIN], "running", "completing on node3 for 1:02"),
        ("101|101|PENDING|0:00||BeginTime", [BEGIN], "requeued", "BeginTime; before: it ended without a word"),
        (
            "101|101|PENDING|0:00||Priority", [BEGIN, end("requeued", "stopped (SIGUSR1)")],
            "requeued", "Priority; before: stopped (SIGUSR1)",
        ),
        ("105|101|PENDING|0:00||JobArrayTaskLimit", [SUBMIT], "pending", "JobArrayTaskLimit"),
        ("105|101|RUNNING|0:01|node9|None", [BEGIN], "failed", "job 101 ended without a word"),  # of another study run
        ("101|101|CANCELLED|0:00||None", [SUBMIT], "stopped", "job 101 was cancelled"),
        ("101|101|NODE_FAIL|0:09|node1|None", [SUBMIT, BEGIN], "failed", "job 101 ended without a word: node_fail"),
        ("", [SUBMIT], "failed", "job 101 left the queue before it began"),
        ("", [SUBMIT, BEGIN], "failed", "job 101 ended without a word"),
        ("", [BEGIN, end("requeued", "stopped (SIGUSR1)")], "stopped", "job 101 was requeued and has left the queue"),
        ("", [BEGIN, end("stopped", "stopped as asked (STOP)")], "stopped", "stopped as asked (STOP)"),
        ("", [BEGIN, end("failed", "rank 3 on node2: disk full")], "failed", "rank 3 on node2: disk full"),
        ("", [BEGIN, end("failed", "x"), {"event": "submit", "job_id": 102}], "failed", "job 102 left the queue"),
    ],
)  # fmt: skip
def test_states_of_jobs(slurm, make_run, row_of, queue, events, state, reason):
    slurm.queue("7|7|RUNNING|9:00|node7|None", queue)
    row = row_of(make_run(steps=(50,), records=60, events=events))
    assert row["state"] == state
    assert str(row["reason"]).startswith(reason)
    assert row["job_id"] in ("101", "102", "105")
    assert row["step"] == 60 and row["train_steps"] == 100 and row["checkpoint_step"] == 50
    assert row["loss"] == pytest.approx(8.4) and row["tokens_per_second"] == 5e6


def test_states_without_jobs(slurm, make_run, row_of):
    assert row_of(make_run("new"))["state"] == "planned"
    assert row_of(make_run("begun", records=3))["state"] == "stopped"
    assert row_of(make_run("done", steps=(50, 100), records=100))["state"] == "done"
    assert row_of(make_run("nearly", steps=(50,), records=100))["state"] == "stopped"  # its last is not saved
    stopped = row_of(make_run("asked", records=3, STOP=""))
    assert stopped["state"] == "stopped" and "STOP is there" in stopped["reason"]


def test_the_part_of_a_chain_that_runs(slurm, make_run, row_of):
    slurm.queue("101|101|PENDING|0:00||JobArrayTaskLimit", "102|101|RUNNING|0:09|node1|None")
    row = row_of(make_run(records=5, events=[SUBMIT]))
    assert (row["state"], row["job_id"]) == ("running", "102")


def test_done_although_the_rest_of_its_chain_waits(slurm, make_run, row_of):
    slurm.queue("101|101|PENDING|0:00||JobArrayTaskLimit")
    assert row_of(make_run(steps=(100,), records=100, events=[SUBMIT]))["state"] == "done"


def test_an_unfinished_checkpoint_is_none(slurm, make_run, row_of):
    folder = make_run(steps=(50,))
    (folder / "checkpoints/step_00000100").mkdir()
    (folder / "checkpoints/tmp_step_00000150").mkdir()
    assert row_of(folder)["checkpoint_step"] == 50


def test_who_trains_without_slurm(make_run, row_of, tmp_path, monkeypatch):
    take_away(monkeypatch, tmp_path / "bin")
    here = {"host": socket.gethostname(), "pid": os.getpid(), "slurm_job_id": None}
    row = row_of(make_run("a", __lock=json.dumps(here)))
    assert row["state"] == "running" and row["reason"] == f"process {os.getpid()} on {here['host']}"
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    assert row_of(make_run("b", __lock=json.dumps(here | {"pid": gone.pid})))["state"] == "planned"
    there = {"host": "other", "pid": 1, "slurm_job_id": "55"}
    folder = make_run("c", __lock=json.dumps(there))
    row = row_of(folder)
    assert row["state"] == "running" and row["job_id"] == "55"
    os.utime(folder / ".lock", (time.time() - 600,) * 2)  # its heart has stopped
    assert row_of(folder)["state"] == "planned"
    row = row_of(make_run("d", events=[SUBMIT]))
    assert row["state"] == "pending" and "no squeue here" in row["reason"]
    assert row_of(make_run("e", events=[BEGIN, end("requeued", "stopped")]))["state"] == "requeued"


def test_a_scheduler_that_is_silent(slurm, make_run, capfd):
    make_run("a", events=[SUBMIT])
    slurm.go_down()
    assert main(["status", str(slurm.folder.parent / "runs")]) == 0
    out = capfd.readouterr().out
    assert "pending" in out and out.splitlines()[-1].startswith("without the scheduler's word: squeue")


def test_damage_has_a_row(slurm, make_run, capfd):
    make_run("a", records=2)
    runs = make_run("b", recipe__yaml="{").parent
    make_run("c", recipe__yaml="name: [1]\n", steps=(7,))
    folder = make_run("d", records=5, events=[BEGIN, end("failed", "why")])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo\n\0\0\0\n{"step": 7, "loss": "x", "tokens_per_second": null}\n{"step": 8, "l')
    with (folder / "jobs.jsonl").open("ab") as file:
        file.write(b'\xff{"event": "en')
    (make_run("e") / "recipe.yaml").unlink()
    (runs / "e/metrics.jsonl").write_text("")
    make_run("f", jobs__jsonl='[1]\n{"event": "begin", "job_id": {}}\n')
    odd = make_run("g")
    (odd / "metrics.jsonl").mkdir()
    (odd / "jobs.jsonl").mkdir()
    assert main(["status", str(runs)]) == 0
    rows = {Path(line.split()[0]).name: line for line in capfd.readouterr().out.splitlines()}
    assert "stopped" in rows["a"] and "2/100" in rows["a"]
    assert "damaged" in rows["b"] and "recipe.yaml cannot be read" in rows["b"]
    assert "damaged" in rows["c"] and "recipe.yaml has" in rows["c"] and "7/?" in rows["c"]
    assert "failed" in rows["d"] and "7/100" in rows["d"] and "8.950" in rows["d"]
    assert "why; 2 line(s) of metrics.jsonl cannot be read; jobs.jsonl has lines that cannot be read" in rows["d"]
    assert "damaged" in rows["e"] and "no recipe.yaml" in rows["e"]
    assert "jobs.jsonl has lines that cannot be read" in rows["f"]
    assert "damaged" in rows["g"]


def test_the_table(slurm, make_run, capfd, monkeypatch):
    runs = make_run("b/x", steps=(50,), records=60, events=[SUBMIT]).parent.parent
    make_run("a", steps=(100,), records=100)
    (runs / "data").mkdir()
    (runs / "data/manifest.json").touch()
    (runs / "data/checkpoints").mkdir()  # not looked at
    (runs / "a/aside/then").mkdir(parents=True)
    (runs / "a/aside/then/recipe.yaml").touch()
    slurm.queue("101|101|RUNNING|1:02|node[1-2]|None")
    monkeypatch.chdir(runs.parent)
    assert main(["status"]) == 0
    head, *lines = capfd.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "step", "tokens/s", "loss", "last", "checkpoint", "job", "reason"]
    assert [line.split()[0] for line in lines] == ["runs/a", "runs/b/x"]
    assert lines[1].split()[1:5] == ["running", "60/100", "5,000,000", "8.400"]
    assert lines[1].endswith("101  running on node[1-2] for 1:02")
    for name in ("state", "reason"):
        assert lines[1][head.index(name) :].startswith("running")
    assert main(["status", "runs/b/x", "runs/b", "runs"]) == 0  # each once
    assert len(capfd.readouterr().out.splitlines()) == 3


def test_no_runs(slurm, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0
    assert capfd.readouterr().out == "no runs in runs\n"
    assert main(["status", "nowhere"]) == 2
    assert "error: no folder nowhere" in capfd.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["status", "empty"]) == 2
    assert "is not a run, and has none in it" in capfd.readouterr().err


def test_only_the_tail_is_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(20_000)]
    file.write_text("".join(lines))
    records, torn = tail_records(file)
    assert torn == 0 and records[-1]["step"] == 19_999 and 0 < len(records) * len(lines[-1]) <= TAIL_BYTES
    steps = [record["step"] for record in records]
    assert steps == list(range(steps[0], 20_000))


def test_imports_no_torch(make_run):
    """So that it answers at once."""
    folder = make_run("s/a", records=2).parent.parent
    (folder / "s/plan.json").write_text(json.dumps({"runs": {"a": {}, "b": {}}}))
    code = (
        "import sys; from pretrain.__main__ import main; "
        f"assert main(['status', {str(folder)!r}]) == 0; "
        "assert not {'torch', 'numpy', 'deepspeed'} & sys.modules.keys(), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_terminal_that_cannot_show_a_letter(make_run):
    folder = make_run("né", records=2).parent
    command = [sys.executable, "-m", "pretrain", "status", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0 and b"n\\xe9" in done.stdout, done.stderr.decode()
