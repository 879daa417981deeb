"""``pretrain status``: one table of runs, from what they wrote and what the scheduler says. Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.cluster.queue import QueuedJob, jobs_of, read_queue
from pretrain.cluster.run_records import RunRecords, read_run
from pretrain.console import age_in_words, say, table_lines
from pretrain.errors import UserError

DEFAULT_FOLDER = Path("runs")
SIGNS_OF_A_RUN = ("recipe.yaml", "metrics.jsonl", "jobs.jsonl", "checkpoints")
DEPTH = 4  # of folders that are searched
WORKING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
HEAD = ("run", "state", "step", "tokens/s", "loss", "last checkpoint", "job", "reason")
TO_THE_RIGHT = ("step", "tokens/s", "loss")


def status(options: argparse.Namespace) -> None:
    """A line for each run, in the order of their names."""
    try:
        queue, remark = read_queue(), ""
    except UserError as error:
        queue, remark = None, f"without the scheduler's word: {' '.join(str(error).split())}"
    rows = [_row(path, queue) for path in _runs(options.folders)]
    if options.json:
        say(json.dumps(rows, indent=2))
        return
    if not rows:
        say(f"no runs in {DEFAULT_FOLDER}")
    else:
        for line in table_lines(HEAD, [_cells(row) for row in rows], TO_THE_RIGHT):
            say(line.rstrip())
    if remark:
        say(remark)


def _runs(given: Sequence[Path]) -> list[Path]:
    """
    Raises:
        UserError: a path that is no run and has none below it.
    """
    found = []
    for folder in given or [DEFAULT_FOLDER]:
        below = sorted(_runs_below(folder, DEPTH))
        if given and not below:
            raise UserError(f"{folder} is not a run, and has none in it" if folder.is_dir() else f"no folder {folder}")
        found += below
    return list(dict.fromkeys(found))


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = {entry.name: entry for entry in os.scandir(folder)}
    except OSError:
        return
    if "manifest.json" in entries:  # prepared data
        return
    if any(name in entries for name in SIGNS_OF_A_RUN):
        yield folder
    elif depth:
        for entry in entries.values():
            if entry.is_dir():
                yield from _runs_below(folder / entry.name, depth - 1)


def _row(path: Path, queue: Sequence[QueuedJob] | None) -> dict[str, Any]:
    """What is known of one run; a damaged one has a row that says so."""
    try:
        run = read_run(path)
        state, job, reason = _state(run, queue)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return {"run": str(path), "state": "damaged", "reason": f"its files cannot be read: {error}"}
    if "recipe.yaml" in "".join(run.problems) and state in ("planned", "stopped"):
        state = "damaged"
    rate = run.record.get("tokens_per_second")
    return {
        "run": str(path),
        "state": state,
        "step": run.step,
        "train_steps": run.train_steps,
        "tokens_per_second": rate if isinstance(rate, (int, float)) else None,
        "loss": run.loss,
        "checkpoint_step": run.checkpoint_step,
        "checkpoint_age_seconds": run.checkpoint_age,
        "job_id": job,
        "reason": "; ".join(part for part in (reason, *run.problems) if part),
    }


def _state(run: RunRecords, queue: Sequence[QueuedJob] | None) -> tuple[str, str | None, str]:
    """State, the number of the job that it is about, and the reason."""
    jobs = jobs_of(run.jobs, queue or ())
    last = run.jobs[-1] if run.jobs else None
    stop = "STOP is there: no training starts until it is deleted" if run.folder.stop_file.exists() else ""
    for job in sorted((job for job in jobs if job.is_alive), key=lambda job: job.state not in WORKING):
        if job.state in WORKING:
            return "running", job.job_id, stop or f"{job.state.lower()} on {job.nodes} for {job.elapsed}"
        if run.is_done:
            break
        words = [
            event for event in run.jobs if event["event"] in ("begin", "end") and str(event["job_id"]) == job.job_id
        ]
        if not words:
            return "pending", job.job_id, job.reason
        before = words[-1].get("reason", "it ended without a word: preempted, or its node was lost")
        return "requeued", job.job_id, f"{job.reason}; before: {before}"
    if run.holder is not None:
        job_id = run.holder.get("slurm_job_id")
        return "running", job_id and str(job_id), stop or f"process {run.holder['pid']} on {run.holder['host']}"
    if run.is_done:
        return "done", str(last["job_id"]) if last else None, ""
    if last is None:
        return ("stopped" if run.step else "planned"), None, stop
    state, reason = _after(last, {job.job_id: job for job in jobs}, queue is not None)
    return state, str(last["job_id"]), stop or reason


def _after(last: dict[str, Any], jobs: dict[str, QueuedJob], asked: bool) -> tuple[str, str]:
    """State and reason of a run whose last word about jobs was this, none of which is alive as far as is known."""
    job_id, event = str(last["job_id"]), last["event"]
    ended = jobs.get(job_id)
    if ended is not None and ended.state == "CANCELLED" and event != "end":
        return "stopped", f"job {job_id} was cancelled"
    if event == "end":
        action, reason = str(last.get("action")), str(last.get("reason", ""))
        if action == "requeued" and asked:
            return "stopped", f"job {job_id} was requeued and has left the queue{_in_state(ended)}"
        return {"requeued": "requeued", "failed": "failed"}.get(action, "stopped"), reason
    if event == "begin":
        return "failed", f"job {job_id} ended without a word{_in_state(ended)}"
    if asked:
        return "failed", f"job {job_id} left the queue before it began{_in_state(ended)}"
    return "pending", "as it was submitted: no squeue here to ask"


def _in_state(job: QueuedJob | None) -> str:
    return "" if job is None else f": {job.state.lower()}"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    total, checkpoint, age = row.get("train_steps"), row.get("checkpoint_step"), row.get("checkpoint_age_seconds")
    rate, loss = row.get("tokens_per_second"), row.get("loss")
    return (
        row["run"],
        row["state"],
        f"{row['step']:,}/{'?' if total is None else f'{total:,}'}" if "step" in row else "?",
        "" if rate is None else f"{rate:,.0f}",
        "" if loss is None else f"{loss:.3f}",
        "" if checkpoint is None else f"{checkpoint:,}, {age_in_words(age or 0.0)} ago",
        row.get("job_id") or "",
        row["reason"],
    )
