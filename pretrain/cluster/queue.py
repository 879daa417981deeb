"""What the scheduler knows: one call of ``squeue`` for all jobs."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass

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

    def is_one_of(self, job_ids: Collection[str]) -> bool:
        return self.job_id in job_ids or self.array_id in job_ids


def read_queue() -> list[QueuedJob] | None:
    """All jobs that SLURM remembers; None where there is no SLURM.

    Raises:
        UserError: it does not answer.
    """
    if shutil.which("squeue") is None:
        return None
    lines = ask(["squeue", "--noheader", "--states=all", f"--format={FIELDS}"]).splitlines()
    return [QueuedJob(*line.strip().split("|", 5)) for line in lines if line.count("|") >= 5]
