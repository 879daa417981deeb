"""``state.json`` of a run of a study: where it is. One writer at a time: the runner, or the job that trains it."""

from __future__ import annotations

import datetime
import json
import os
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pretrain.files import make_folder, write_json

STATE_FILE = "state.json"
STATE_FORMAT = 1
State = Literal["planned", "running", "preempted", "failed", "done"]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """
    Attributes:
        cause: of a failure or preemption, in words.
        failures: how often it has failed, until it is done.
        since: when it came into this state.
        host, process: who runs it. job_id: of SLURM.
        commit: the git commit it was last run with; empty where there is none.
    """

    state: State = "planned"
    cause: str = ""
    failures: int = 0
    since: str = ""
    host: str = ""
    process: int | None = None
    job_id: str | None = None
    commit: str = ""


def read_state(run: Path) -> RunState:
    """Of a run folder; planned where nothing is said, or nothing that can be read."""
    try:
        tree = json.loads((run / STATE_FILE).read_text(encoding="utf-8"))
        if tree.pop("format") == STATE_FORMAT:
            return RunState(**tree)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return RunState()


def write_state(run: Path, before: RunState, state: State, cause: str = "", commit: str | None = None) -> RunState:
    """Write the next state, atomically; a failure is counted, and the end of a run forgets them."""
    failures = before.failures + (state == "failed")
    running = state == "running"
    after = replace(
        before,
        state=state,
        cause=cause,
        failures=0 if state == "done" else failures,
        since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        host=socket.gethostname() if running else before.host,
        process=os.getpid() if running else None,
        job_id=os.environ.get("SLURM_JOB_ID") if running else before.job_id,
        commit=before.commit if commit is None else commit,
    )
    make_folder(run)
    write_json(run / STATE_FILE, {"format": STATE_FORMAT, **asdict(after)})
    return after
