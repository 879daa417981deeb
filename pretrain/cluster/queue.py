"""What the scheduler knows: one call of ``squeue`` for all jobs."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from pretrain.cluster.job import OVER, ask

ENDED = (*OVER, "PREEMPTED", "REVOKED")
FIELDS = "%A|%F|%T|%M|%N|%r"


@dataclass(frozen=True)
class QueuedJob:
    """A job that waits, runs, or ended a few minutes ago."""

    job_id: str
    array_id: str  # of the array that it is a part of, otherwise its own
    state: str  # as squeue has it: PENDING, RUNNING, ...
    elapsed: str
    nodes: str
    reason: str  # of the scheduler

    @property
    def is_alive(self) -> bool:
        return self.state not in ENDED


def jobs_of(events: Collection[dict[str, Any]], queue: Iterable[QueuedJob]) -> list[QueuedJob]:
    """Those of a run with these events in jobs.jsonl.

    An array that was submitted for the run is all its own. One of which a part trained it may be a study, whose other
    parts train other runs.
    """
    own = {str(event["job_id"]) for event in events}
    arrays = {str(event["job_id"]) for event in events if event["event"] == "submit"}
    return [job for job in queue if job.job_id in own or job.array_id in arrays]


def read_queue() -> list[QueuedJob] | None:
    """All jobs that SLURM remembers; None where there is no SLURM.

    Raises:
        UserError: it does not answer.
    """
    if shutil.which("squeue") is None:
        return None
    lines = ask(["squeue", "--noheader", "--states=all", f"--format={FIELDS}"]).splitlines()
    return [QueuedJob(*line.strip().split("|", 5)) for line in lines if line.count("|") >= 5]
