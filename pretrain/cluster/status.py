"""``pretrain status``: one table of runs, from what they wrote and what the scheduler says. Imports no torch.

Of a study, a folder with ``plan.json``, it shows the runs that are planned, whether they have begun or not.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.cluster.job import read_events
from pretrain.cluster.queue import QueuedJob, jobs_of, read_queue
from pretrain.cluster.run_records import RunRecords, read_run
from pretrain.console import age_in_words, say, table_lines
from pretrain.errors import UserError
from pretrain.recipe_io import load_recipe
from pretrain.run_lock import is_dead
from pretrain.study.state import STATE_FILE, RunState, read_state

DEFAULT_FOLDER = Path("runs")
SIGNS_OF_A_RUN = ("recipe.yaml", "metrics.jsonl", "jobs.jsonl", "checkpoints", STATE_FILE)
PLAN = "plan.json"  # of a study, as pretrain.study.study_folder has it
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
    if PLAN in entries and (planned := _planned_in(folder)):
        yield from (folder / name for name in planned)
    elif PLAN not in entries and any(name in entries for name in SIGNS_OF_A_RUN):
        yield folder
    elif depth:
        for entry in entries.values():
            if entry.is_dir():
                yield from _runs_below(folder / entry.name, depth - 1)


def _planned_in(folder: Path) -> list[str]:
    """Names of the runs of a study; empty where there is no plan, or none that can be read."""
    try:
        runs = json.loads((folder / PLAN).read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [*runs] if isinstance(runs, dict) else []


def _row(path: Path, queue: Sequence[QueuedJob] | None) -> dict[str, Any]:
    """What is known of one run; a damaged one has a row that says so."""
    try:
        run = read_run(path)
        if path.absolute().name in _planned_in(path.absolute().parent):
            state, job, reason = _state_in_study(run, queue)
            _add_planned_steps(run)
        else:
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


def _state_in_study(run: RunRecords, queue: Sequence[QueuedJob] | None) -> tuple[str, str | None, str]:
    """As :func:`_state`, with what the study says: it also evaluates the run, and may not have begun it yet."""
    state, job, reason = _state(run, queue)
    said = read_state(run.folder.path)
    if state in ("running", "requeued", "pending"):
        return state, job, reason
    if said.state == "done":
        return "done", job, ""
    if not said.since and run.step:  # trained, but the study has no word of it
        return state, job, reason
    submit = _last_submit(run)
    if submit is not None and said.since <= str(submit.get("time", "")):  # no job of that array has begun it
        return _in_array(submit, queue)
    if said.state == "running":
        return _said_to_run(said, queue)
    if said.state == "planned":
        return state, job, reason
    return said.state, job, said.cause


def _last_submit(run: RunRecords) -> dict[str, Any] | None:
    """Of an array of the study with this run in it."""
    path = run.folder.path.absolute()
    submits = [event for event in read_events(path.parent / "jobs.jsonl") if event["event"] == "submit"]
    return next(
        (event for event in reversed(submits) if path.name in event.get("runs", ()) and "job_id" in event), None
    )


def _in_array(submit: dict[str, Any], queue: Sequence[QueuedJob] | None) -> tuple[str, str, str]:
    """Of a run that the array was to train. All its jobs that wait are one line of the queue, under its own number."""
    array = str(submit["job_id"])
    parts = sorted((job for job in queue or () if job.array_id == array), key=lambda job: job.job_id != array)
    alive = [job for job in parts if job.is_alive]
    for job in alive:
        if job.state not in WORKING:
            return "pending", array, job.reason
    if alive:
        return "pending", array, f"other jobs of the array {array} run, and none has begun it"
    state, reason = _after(submit, {job.job_id: job for job in parts}, queue is not None)
    return state, array, reason


def _said_to_run(said: RunState, queue: Sequence[QueuedJob] | None) -> tuple[str, str | None, str]:
    """Of a run whose runner or job said so, and of which no training is alive: it is evaluated, or was lost."""
    process = f"process {said.process} on {said.host}"
    if said.job_id is None:
        if is_dead({"host": said.host, "pid": said.process or 0}):
            return "stopped", None, f"its runner, {process}, ended without a word"
        return "running", None, process
    job = next((job for job in queue or () if job.job_id == said.job_id), None)
    if job is not None and job.state in WORKING:
        return "running", job.job_id, f"{job.state.lower()} on {job.nodes} for {job.elapsed}"
    if job is not None and job.is_alive:
        return "requeued", job.job_id, job.reason
    if queue is None:
        return "running", said.job_id, f"{process}, as it said: no squeue here to ask"
    return "failed", said.job_id, f"job {said.job_id} ended without a word{_in_state(job)}"


def _add_planned_steps(run: RunRecords) -> None:
    """A run that has trained nothing yet need not have a recipe of its own: the study keeps one for it."""
    path = run.folder.path.absolute()
    if run.folder.recipe_file.exists() or run.folder.metrics_file.exists() or run.folder.checkpoints.exists():
        return
    run.problems = [problem for problem in run.problems if problem != "no recipe.yaml"]
    try:
        run.train_steps = load_recipe(str(path.parent / "recipes" / f"{path.name}.yaml")).batch.train_steps
    except UserError:
        run.problems.append(f"recipes/{path.name}.yaml of the study cannot be read")


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
