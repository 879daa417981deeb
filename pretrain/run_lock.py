"""One training at a time in a run folder, on any node that shares it.

The file ``.lock`` is locked by every process of the run on the first node, so that the lock ends with the last of them,
however it ends. It says who holds it. Where file locks do not reach other nodes, a changing time stamp does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.errors import UserError

HEARTBEAT_SECONDS = 5.0
ENDING_SECONDS = 60.0  # ranks whose launcher was killed are gone by then


@contextlib.contextmanager
def run_lock(folder: Path, *, succeeds: bool = False) -> Iterator[int]:
    """Hold the lock of a run folder.

    Args:
        succeeds: the holder, if there is one, has been told to leave and writes nothing more
            (:mod:`pretrain.cluster.incarnation`): wait for it, and go on without the lock if it cannot be reached.

    Yields:
        The file descriptor that keeps it, for the ranks to inherit.

    Raises:
        UserError: another training holds it, and who that is.
    """
    path = folder / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(descriptor, done), daemon=True)
    try:
        holder = _read(path)
        beats = holder and holder["host"] != socket.gethostname() and not succeeds and _beats(path)
        if not _locked(descriptor, path, succeeds) or beats:
            raise UserError(
                f"another process is training in {folder}: {_describe(_read(path))}. Wait until it ends, or give "
                "this run another name=..."
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_self()).encode(), 0)
        heart.start()
        try:
            yield descriptor
        finally:
            done.set()
            heart.join()
            os.ftruncate(descriptor, 0)  # the next need not look for a heartbeat
    finally:
        os.close(descriptor)


def _locked(descriptor: int, path: Path, succeeds: bool) -> bool:
    """Take the lock; wait for the ranks of a holder that is dead or leaves, but not for another."""
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return succeeds
            if not succeeds and not _is_dead(_read(path)):
                return False
            time.sleep(0.1)
        except OSError:  # this file system has no locks: the note and the heartbeat have to do
            holder = _read(path)
            return succeeds or not holder or _is_dead(holder) or not _beats(path)


def _self() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _read(path: Path) -> dict[str, Any]:
    """Who holds the lock, or held it when the machine went down; empty if nobody does."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return holder if {"host", "pid"} <= holder.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Known to be: its process ran on this machine and is gone."""
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _beats(path: Path) -> bool:
    """Whether somebody touches the lock file; takes three heartbeats to tell that nobody does."""
    before = path.stat().st_mtime_ns
    deadline = time.monotonic() + 3 * HEARTBEAT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_SECONDS / 5)
        with path.open("rb") as file:  # opening asks the server of a network file system
            if os.fstat(file.fileno()).st_mtime_ns != before:
                return True
    return False


def _beat(descriptor: int, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "it does not say which"
    job = f" of SLURM job {holder['slurm_job_id']}" if holder.get("slurm_job_id") else ""
    return f"process {holder['pid']} on {holder['host']}{job}, since {holder.get('since')}"
