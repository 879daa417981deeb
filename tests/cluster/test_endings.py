"""What a job says about its end, from what its ranks and nodes left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.cluster import endings
from pretrain.cluster.endings import how_it_ended

ROOT = Path(__file__).resolve().parents[2]
GLOO = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:53"


def rank(folder: Path, number: int, code: int | None = None, reason: str = "", ended: float = 100.0, **more: object):
    record = {"rank": number, "host": f"node{number // 2}", "pid": 10, "began": 1.0}
    if code is not None:
        record |= {"code": code, "reason": reason, "ended": ended}
    (folder / f"rank_{number:05d}.json").write_text(json.dumps(record | more))


def node(folder: Path, name: str, **codes: int):
    failures = [{"rank": int(number[1:]), "code": code, "ended": 99.0} for number, code in codes.items()]
    (folder / f"node_{name}.json").write_text(json.dumps({"host": name, "failures": failures}))


def test_all_done(tmp_path):
    for number in range(4):
        rank(tmp_path, number, 0)
    assert how_it_ended(tmp_path, 4, 0).code == 0


def test_all_stopped_and_one_rank_heard_the_signal(tmp_path):
    for number in range(4):
        rank(tmp_path, number, 75, stopped_by=["SIGUSR1"] if number == 3 else [])
    ending = how_it_ended(tmp_path, 4, 0)
    assert (ending.code, ending.stopped_by) == (75, {"SIGUSR1"}) and "SIGUSR1" in ending.reason


@pytest.mark.parametrize("said", [{}, {"r0": -10, "r1": -10}, {"r0": -15, "r1": -10}])
def test_what_does_not_listen_to_the_signal_before_the_time_limit(tmp_path, said):
    """An evaluation ends by it, its launcher too or a moment later."""
    for number in range(2):
        rank(tmp_path, number)
    if said:
        node(tmp_path, "node0", **said)
    ending = how_it_ended(tmp_path, 2, 138)
    assert (ending.code, ending.reason, ending.stopped_by) == (75, "interrupted (SIGUSR1)", {"SIGUSR1"})
    rank(tmp_path, 1, 1, GLOO)
    assert how_it_ended(tmp_path, 2, 138).code == 75
    rank(tmp_path, 1, 2, "no such file")
    assert how_it_ended(tmp_path, 2, 138).code != 75, "it failed before"


def test_a_rank_without_an_end_is_no_stop(tmp_path):
    for number in range(3):
        rank(tmp_path, number, 75)
    assert how_it_ended(tmp_path, 4, 0).code == 1
    rank(tmp_path, 3)
    ending = how_it_ended(tmp_path, 4, 9)
    assert ending.code == 9 and "rank 3 (node1) said nothing" in ending.reason


def test_the_killed_rank_is_the_cause_though_others_spoke_first(tmp_path):
    for number in (0, 1, 2):
        rank(tmp_path, number, 1, GLOO, ended=98.0)
    rank(tmp_path, 3)
    node(tmp_path, "node0", r0=1, r1=1)
    node(tmp_path, "node1", r3=-9, r2=-15)
    ending = how_it_ended(tmp_path, 4, 137)
    assert (ending.code, ending.reason) == (137, "rank 3 on node1: killed by SIGKILL")


def test_the_first_error_counts(tmp_path):
    rank(tmp_path, 0, 1, "ValueError: late", ended=101.0)
    rank(tmp_path, 1, 2, "error: early", ended=100.0)
    rank(tmp_path, 2, 1, GLOO, ended=99.0)
    rank(tmp_path, 3, 143, "", ended=98.0)  # ended by torchrun
    ending = how_it_ended(tmp_path, 4, 1)
    assert (ending.code, ending.reason) == (2, "rank 1 on node0: error: early")


def test_a_hang_names_the_ranks_that_said_nothing(tmp_path):
    for number in (0, 1, 2):
        rank(tmp_path, number, 70, f"rank {number} hangs: no end of step 7 after 60 s", ended=100.0 + number)
    rank(tmp_path, 3)
    ending = how_it_ended(tmp_path, 4, 70)
    assert ending.code == 70
    assert ending.reason.endswith("no end of step 7 after 60 s; rank 3 (node1) said nothing")


def test_no_rank_started(tmp_path):
    assert "no rank started" in how_it_ended(tmp_path, 4, 1).reason
    (tmp_path / "rank_00000.json").write_text('{"rank": 0, "host"')  # torn by a full disk
    assert how_it_ended(tmp_path, 4, 0).code == 1
    (tmp_path / "node_node1.log").write_text("slurmstepd-node1: error: *** STEP 1.0 ON node1 CANCELLED ***\n")
    (tmp_path / "node_node2.log").write_text("Traceback\n  File x\nModuleNotFoundError: No module named 'torch'\n\n")
    reason = how_it_ended(tmp_path, 4, 1).reason
    assert reason == "no rank started; srun ended with 1; node2: ModuleNotFoundError: No module named 'torch'"


def test_a_list_of_problems_is_one_line(tmp_path):
    rank(tmp_path, 0, 2, "error: 2 problems:\n  - one\n  - two")
    assert how_it_ended(tmp_path, 1, 2).reason == "rank 0 on node0: error: 2 problems: - one - two"


@pytest.mark.parametrize(
    ("recipe", "code", "words"),
    [("no_such_recipe", 2, "no_such_recipe"), ("quickstart_plain", 2, "nonsense")],
)
def test_a_rank_leaves_its_log_and_its_end(tmp_path, recipe, code, words):
    environment = os.environ | {"RANK": "2", "PRETRAIN_JOB_LOGS": str(tmp_path)}
    command = [sys.executable, "-m", "pretrain", "train", recipe, "nonsense=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code and done.stdout + done.stderr == ""
    record = json.loads((tmp_path / "rank_00002.json").read_text())
    assert record["code"] == code and words in record["reason"] and record["host"]
    assert how_it_ended(tmp_path, 1, code).code == code


def test_signal_names_of_an_unknown_signal(tmp_path):
    rank(tmp_path, 0)
    node(tmp_path, "node0", r0=-int(signal.SIGRTMIN) - 1)
    assert "killed by" in how_it_ended(tmp_path, 1, 1).reason


def test_all_ranks_found_the_same(tmp_path):
    for number in range(2):
        rank(tmp_path, number, 2, "error: node9 has\nanother clock", common=True)
    assert how_it_ended(tmp_path, 2, 2).reason == "error: node9 has another clock"


def test_a_node_on_which_no_rank_started(tmp_path):
    rank(tmp_path, 0, 1, GLOO, ended=98.0)
    record = {"host": "node1", "code": 1, "reason": "torchrun: OSError: no room", "ended": 99.0}
    (tmp_path / "node_node1.json").write_text(json.dumps(record))
    assert how_it_ended(tmp_path, 2, 1).reason == "node1: torchrun: OSError: no room"


def test_all_ranks_were_terminated(tmp_path):
    for number in range(2):
        rank(tmp_path, number, 143)
    assert how_it_ended(tmp_path, 2, 143).reason == "srun ended with 143, and no rank said why"


def test_the_record_of_the_end_takes_no_more_room(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("PRETRAIN_JOB_LOGS", str(tmp_path))
    monkeypatch.setattr(endings, "_facts", {"rank": 2, "host": "node1"})
    path = tmp_path / "rank_00002.json"
    endings._write(path)
    before = path.stat()
    endings.note_end(2, "\U0001f600" * 2000)
    endings.note_end(0, "too late")
    after = path.stat()
    assert (after.st_ino, after.st_size) == (before.st_ino, before.st_size) and after.st_size == 4096
    assert json.loads(path.read_text())["code"] == 2


def test_a_node_that_is_lost(tmp_path):
    for number in range(4):
        rank(tmp_path, number, *((1, GLOO) if number < 2 else ()))
    node(tmp_path, "node0", r0=1, r1=1)
    ending = how_it_ended(tmp_path, 4, 1)
    assert (ending.code, ending.reason, ending.lost_node) == (75, "contact lost with node1", True)
    rank(tmp_path, 0, 1, "ValueError: broken")
    ending = how_it_ended(tmp_path, 4, 1)
    assert (ending.code, ending.lost_node) == (1, False)


def test_when_all_nodes_are_silent_none_is_lost(tmp_path):
    for number in range(4):
        rank(tmp_path, number)
    assert not how_it_ended(tmp_path, 4, 137).lost_node
