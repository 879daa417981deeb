"""One training in a run folder: who holds it is named, and nobody who is gone blocks the next."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pretrain import run_lock as module
from pretrain.errors import UserError
from pretrain.run_lock import run_lock

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import subprocess, sys, time
from pathlib import Path
from pretrain.run_lock import run_lock
with run_lock(Path(sys.argv[1])) as lock:
    rank = subprocess.Popen(["sleep", sys.argv[2]], pass_fds=[lock], stdout=subprocess.DEVNULL)
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path, rank_seconds: float = 0) -> subprocess.Popen[str]:
    """A process that holds the lock, with a rank that inherited it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(rank_seconds)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_held_by_a_living_process(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    process = hold(tmp_path)
    with (
        pytest.raises(UserError, match=f"process {process.pid} on {socket.gethostname()} of SLURM job 77, since 20"),
        run_lock(tmp_path),
    ):
        pass
    process.kill()
    process.wait()


def test_a_killed_holder_does_not_block(tmp_path):
    process = hold(tmp_path)
    process.kill()
    process.wait()
    with run_lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / ".lock").read_text() == ""


def test_ranks_of_a_killed_launcher_are_waited_for(tmp_path):
    begin = time.monotonic()
    process = hold(tmp_path, rank_seconds=3)
    process.kill()
    process.wait()
    with run_lock(tmp_path):
        assert time.monotonic() - begin > 3


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_node(tmp_path, monkeypatch, alive):
    """Whose file lock does not reach here: its heartbeat tells whether it is there."""
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.2)
    note = tmp_path / ".lock"
    note.write_text(json.dumps({"host": "other", "pid": 1, "since": "yesterday"}))
    done = threading.Event()
    heart = threading.Thread(target=lambda: [os.utime(note) for _ in iter(lambda: done.wait(0.05), True)])
    if alive:
        heart.start()
        with pytest.raises(UserError, match="process 1 on other, since yesterday"), run_lock(tmp_path):
            pass
        done.set()
        heart.join()
    else:
        with run_lock(tmp_path):
            before = note.stat().st_mtime_ns
            time.sleep(0.5)
            assert note.stat().st_mtime_ns > before


def test_no_locks_on_this_file_system(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", flock)
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.1)
    with run_lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on "), run_lock(tmp_path):
        pass
    with run_lock(tmp_path):
        pass
