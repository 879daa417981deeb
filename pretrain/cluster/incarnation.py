"""Fencing: of two incarnations of a job, only the newer one writes to the run folder.

SLURM starts a job again when a node does not answer, while the tasks on that node may live on. So every start of a job
writes its token, ``JOBID.RESTARTS``, to ``.incarnation`` of the run; an older one finds another token there and leaves:
before a checkpoint gets its name, before a record is written, and at the latest when one rank of each node looks again.
Between looking and renaming lie microseconds that only a lock of the file system could close; a checkpoint that slips
through there is whole, and of the same run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

from pretrain.cluster.endings import note_end
from pretrain.cluster.job import Job, chain_of, is_over, node_name
from pretrain.files import write_text
from pretrain.run_lock import run_lock

EXIT_FENCED = os.EX_NOPERM  # 77
LOOK_SECONDS = 10.0
TOKEN = "PRETRAIN_INCARNATION"
GONE_BACK = ".gone_back"


def take_over(folder: Path, job: Job) -> None:
    """Make this start of ``job`` the one that may write to the run folder.

    Raises:
        UserError: another training holds the folder, and it is not an older start of this job, nor of one that is over.
    """
    predecessor = _read(folder).partition(".")[0]
    # The tasks of a job that is over may live on where SLURM does not reach them.
    if predecessor and (predecessor == job.job_id or is_over(predecessor)):
        write_text(_file(folder), job.incarnation)
    else:
        with run_lock(folder):
            write_text(_file(folder), job.incarnation)


def leave_if_fenced(folder: Path) -> None:
    """End this process at once, with :data:`EXIT_FENCED`, if a newer incarnation has the run; asked before writing.

    Outside a job nothing is ever fenced.
    """
    token = os.environ.get(TOKEN)
    if token is None or (found := _read(folder)) == token:
        return
    line = (
        f"incarnation {token} on {node_name()} leaves and writes nothing more: the run belongs to "
        f"{found or 'another training'} now"
    )
    print(line, file=sys.stderr, flush=True)
    note_end(EXIT_FENCED, line)
    os._exit(EXIT_FENCED)


def watch_fence(folder: Path) -> None:
    """Ask every :data:`LOOK_SECONDS`, as the main thread may wait for ranks that are gone."""
    if TOKEN in os.environ:
        threading.Thread(target=_look, args=(folder,), name="fence", daemon=True).start()


def _look(folder: Path) -> None:
    while True:
        time.sleep(LOOK_SECONDS)
        with contextlib.suppress(OSError):  # a file server that does not answer says nothing of another incarnation
            leave_if_fenced(folder)


def forget_incarnation(folder: Path) -> None:
    """A training outside any job has the run now (it holds the lock): older incarnations leave."""
    if TOKEN not in os.environ:
        _file(folder).unlink(missing_ok=True)


def has_taken_over(folder: Path) -> bool:
    """Whether this process belongs to the incarnation that has the run."""
    return TOKEN in os.environ and _read(folder) == os.environ[TOKEN]


def has_gone_back(folder: Path) -> bool:
    """Whether an earlier start of this job, or of its array, has moved aside what the command says to leave behind."""
    chain, _, token = _text(folder / GONE_BACK).partition(" ")
    return TOKEN in os.environ and chain == chain_of() and token != os.environ[TOKEN]


def note_going_back(folder: Path) -> None:
    """For the starts of this job that follow."""
    if TOKEN in os.environ:
        write_text(folder / GONE_BACK, f"{chain_of()} {os.environ[TOKEN]}")


def _read(folder: Path) -> str:
    return _text(_file(folder))


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def _file(folder: Path) -> Path:
    return folder / ".incarnation"
