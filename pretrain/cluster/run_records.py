"""What a run's own files tell, without reading much of them and without torch."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.checkpointing.folder import MANIFEST, checkpoints_in, step_of
from pretrain.cluster.job import read_events
from pretrain.errors import UserError
from pretrain.run_folder import RunFolder
from pretrain.run_lock import HEARTBEAT_SECONDS, holder_of, is_dead

TAIL_BYTES = 2**16
SILENT_SECONDS = 12 * HEARTBEAT_SECONDS  # a network file system tells late


@dataclass
class RunRecords:
    """One run.

    Attributes:
        problems: what is wrong with the files, a few words each.
        record: the last of the metrics; loss: the last one there is.
        checkpoint_age: seconds.
        holder: who trains in the folder now, see :mod:`pretrain.run_lock`; None: nobody that is alive.
        jobs: events of jobs.jsonl.
    """

    folder: RunFolder
    problems: list[str] = field(default_factory=list)
    train_steps: int | None = None
    record: dict[str, Any] = field(default_factory=dict)
    loss: float | None = None
    checkpoint_step: int | None = None
    checkpoint_age: float | None = None
    holder: dict[str, Any] | None = None
    jobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """The last that is known of: a record, or a checkpoint."""
        recorded = self.record.get("step")
        return max(recorded if isinstance(recorded, int) else 0, self.checkpoint_step or 0)

    @property
    def is_done(self) -> bool:
        """Whether its last step is saved."""
        return self.train_steps is not None and (self.checkpoint_step or 0) >= self.train_steps


def read_run(path: Path) -> RunRecords:
    """Everything that can be read; what cannot is named in ``problems``."""
    folder = RunFolder(path)
    run = RunRecords(folder)
    try:
        run.train_steps = folder.saved_recipe().batch.train_steps
    except UserError as error:
        run.problems.append(str(error).splitlines()[0] if folder.recipe_file.exists() else "no recipe.yaml")
    records, torn = tail_records(folder.metrics_file)
    run.record = records[-1] if records else {}
    run.loss = next((record["loss"] for record in reversed(records) if _is_number(record.get("loss"))), None)
    if torn:
        run.problems.append(f"{torn} line(s) of {folder.metrics_file.name} cannot be read")
    whole = [path for path in checkpoints_in(folder.checkpoints) if (path / MANIFEST).is_file()]
    if whole:
        run.checkpoint_step = step_of(whole[0])
        run.checkpoint_age = max(0.0, time.time() - (whole[0] / MANIFEST).stat().st_mtime)
    run.holder = _living_holder(path)
    run.jobs = [event for event in read_events(folder.jobs_file) if isinstance(event.get("job_id"), (str, int))]
    if len(run.jobs) != _lines_in(folder.jobs_file):
        run.problems.append(f"{folder.jobs_file.name} has lines that cannot be read")
    return run


def tail_records(metrics: Path) -> tuple[list[dict[str, Any]], int]:
    """The last records of ``metrics.jsonl``, oldest first, and how many lines there are none.

    A last line without an end is being written, and is no line yet.
    """
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            content = file.read()
    except OSError:
        return [], 0
    lines = content.split(b"\n")[:-1]
    if size > TAIL_BYTES:
        lines = lines[1:]  # begins somewhere in it
    records = [record for line in lines if (record := _record(line)) is not None]
    return records, sum(bool(line.strip()) for line in lines) - len(records)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _lines_in(file: Path) -> int:
    try:
        return sum(bool(line.strip()) for line in file.read_bytes().split(b"\n"))
    except OSError:
        return 0


def _living_holder(folder: Path) -> dict[str, Any] | None:
    """Who holds the lock: on this machine its process is looked for, on another one its heartbeat."""
    holder = holder_of(folder)
    if not holder or is_dead(holder):
        return None
    try:
        silent = time.time() - (folder / ".lock").stat().st_mtime
    except OSError:
        return None
    return holder if silent < SILENT_SECONDS else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
