"""A worker of ``prepare`` that is killed, as by the kernel when memory runs out; and workers whose parent is."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import process as futures
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from pretrain.data.prepare import prepare
from pretrain.data.prepared import PreparedData
from pretrain.data.workers import workers
from pretrain.errors import UserError
from tests.data.helpers import text_recipe

KILLED = "one of 2 worker processes was killed, probably because memory ran out: set data.prepare_processes lower"
ORPHANS = """
import os, signal
from pretrain.data.workers import workers
with workers(3) as pool:
    print(*pool._processes, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def double(number: int) -> int:
    return 2 * number


def fail(number: int) -> None:
    raise LookupError(f"no {number}")


def slow_length(text: bytes) -> int:
    time.sleep(0.2)
    return len(text)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_and_errors_come_through() -> None:
    with workers(2) as pool:
        assert len(pool._processes) == 2  # forked before anything was given to them
        assert list(pool.map(double, range(4), chunksize=3)) == [0, 2, 4, 6]
        with pytest.raises(LookupError, match="no 3"):
            pool.submit(fail, 3).result()


def test_a_worker_that_is_killed_at_work() -> None:
    with pytest.raises(UserError, match=KILLED), workers(2) as pool:
        pool.submit(die).result()


@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_that_is_killed_while_it_waits(which: int) -> None:
    """One of them holds the lock of the queue."""
    with pytest.raises(UserError, match=KILLED), workers(2) as pool:
        os.kill(sorted(pool._processes)[which], signal.SIGKILL)
        while True:
            pool.submit(time.sleep, 0.05).result()


@pytest.mark.parametrize("closes", [True, False])
def test_a_worker_that_is_killed_while_large_tasks_wait(monkeypatch: pytest.MonkeyPatch, closes: bool) -> None:
    """More than a pipe holds: what writes them waits for a reader, and Python 3.11.0 to 3.11.4 left it so."""
    if not closes:
        source = inspect.getsource(futures._ExecutorManagerThread.terminate_broken)
        earlier = textwrap.dedent(source).replace("self.call_queue._reader.close()", "pass")
        names = dict(vars(futures))
        exec(earlier, names)
        monkeypatch.setattr(futures._ExecutorManagerThread, "terminate_broken", names["terminate_broken"])
    large = b"." * 2**20
    with pytest.raises(UserError, match=KILLED), workers(2) as pool:
        waiting = [pool.submit(slow_length, large) for _ in range(12)]
        os.kill(next(iter(pool._processes)), signal.SIGKILL)
        for task in waiting:
            task.result()


def test_no_worker_outlives_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(pids) == 3
    deadline = time.monotonic() + 30
    while not all(is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline, f"one of {pids} lives on"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Or is a zombie, where nobody collects orphans."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_prepare_with_a_killed_worker_goes_on_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text_recipe(tmp_path, prepare_processes=2)

    def killed(self: Any, *args: Any) -> None:
        die()

    with monkeypatch.context() as patch:
        patch.setattr(IndexedDatasetBuilder, "add_document", killed)
        with pytest.raises(UserError, match=KILLED):
            prepare(recipe)
    assert not (tmp_path / "data" / "manifest.json").exists()
    prepare(recipe)
    assert PreparedData.open(recipe).train_tokens > 0
