"""The SLURM job that this process runs in, what it asks the scheduler, and a run's history of jobs."""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import UserError

OVER = (
    "",
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
)
ASK_SECONDS = 30.0


@dataclass(frozen=True)
class Job:
    """One start of a job. SLURM keeps the job's number when it starts it again, and counts the restarts."""

    job_id: str
    restarts: int
    chain: str  # the array that this job is a part of, otherwise the job itself
    nodes: tuple[str, ...]
    task: str | None = None  # its place in the array

    @property
    def name(self) -> str:
        """As SLURM's commands take it: the last task of an array has the array's number, which means all of them."""
        return self.job_id if self.task is None else f"{self.chain}_{self.task}"

    @property
    def incarnation(self) -> str:
        return f"{self.job_id}.{self.restarts}"


def job_from_environment(environment: Mapping[str, str] = os.environ) -> Job:
    """
    Raises:
        UserError: this is not a SLURM job.
    """
    job_id = environment.get("SLURM_JOB_ID")
    if job_id is None:
        raise UserError("SLURM_JOB_ID is not set: this runs inside a SLURM job, sbatch slurm/train.sbatch RECIPE")
    nodes = ask(["scontrol", "show", "hostnames", environment.get("SLURM_JOB_NODELIST", "")]).split()
    return Job(
        job_id,
        int(environment.get("SLURM_RESTART_COUNT", "0")),
        chain_of(environment),
        tuple(nodes),
        environment.get("SLURM_ARRAY_TASK_ID"),
    )


def chain_of(environment: Mapping[str, str] = os.environ) -> str:
    """The array that this job is a part of, otherwise the job itself; empty outside a job."""
    return environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID", "")


def incarnation_of(environment: Mapping[str, str] = os.environ) -> str:
    """:attr:`Job.incarnation` of the job that this process runs in."""
    return f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_RESTART_COUNT', '0')}"


def node_name(environment: Mapping[str, str] = os.environ) -> str:
    """This machine as SLURM calls it, or as it calls itself."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def rendezvous_port(environment: Mapping[str, str] = os.environ) -> int:
    """Where a job's ranks meet on its first node: a port that other jobs there are unlikely to use.

    Another one for each start, as ranks of an older one may live on. Below 32,768, where Linux begins to give ports to
    connections if it is not told otherwise: a port that some connection has cannot be listened on.
    """
    job_id, restarts = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
    return 20_000 + (job_id + 7919 * restarts) % 12_000


def ask(command: Sequence[str]) -> str:
    """What a command of SLURM prints.

    Raises:
        UserError: it failed, with its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=ASK_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        words = (getattr(error, "stderr", None) or str(error)).strip()
        raise UserError(f"{' '.join(command)} failed: {words}") from error
    return done.stdout


def state_of(job_id: str) -> str:
    """A job's state, ``RUNNING`` for one; empty when SLURM does not know the job any more.

    Raises:
        UserError: SLURM does not answer.
    """
    try:
        # Of an array's number squeue lists all tasks.
        lines = ask(["squeue", "--noheader", "--jobs", job_id, "--states", "all", "--format", "%A %T"]).splitlines()
        return next((words[1] for line in lines if len(words := line.split()) == 2 and words[0] == job_id), "")
    except UserError as error:
        if "Invalid job id" in str(error):
            return ""
        raise


def is_over(job_id: str) -> bool:
    """Whether SLURM says that nothing of this job is to run any more. No word from SLURM is no."""
    try:
        return state_of(job_id) in OVER
    except UserError:
        return False


def record_event(file: Path, event: str, **facts: Any) -> None:
    """One more line of a run's ``jobs.jsonl``."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"event": event, "time": now} | facts) + "\n")


def read_events(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``jobs.jsonl`` in order; a torn one is passed over."""
    events = []
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events
