"""What the batch shell of a job does before and after its ranks: ``python -m pretrain.cluster.batch begin|end ...``.

``begin VERB ...`` refuses bad input before any rank starts, takes over the run, and prints the folder of the job's
logs. ``end LOGS CODE`` says how the job ended, and puts it back into the queue if it is to go on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pretrain.__main__ import parse
from pretrain.checkpointing.folder import checkpoints_in, step_of
from pretrain.cluster.endings import STOPPED, Ending, how_it_ended
from pretrain.cluster.incarnation import take_over
from pretrain.cluster.job import Job, ask, job_from_environment, read_events, record_event, state_of
from pretrain.errors import EXIT_USER_ERROR, UserError
from pretrain.files import make_folder, write_json
from pretrain.recipe_io import load_recipe
from pretrain.run_folder import RunFolder

BEGINS_WITHOUT_PROGRESS = 2  # in a row; then a job does not start again by itself
EXIT_BROKEN = 1
ENDING = "ending.json"  # in the folder of the logs: code and reason of this start, for pretrain.study.job
ANSWER_SECONDS, RETRY_SECONDS = 120.0, 5.0  # the controller may be busy, or starting again


def main(arguments: Sequence[str]) -> int:
    try:
        if arguments[0] == "begin":
            return _begin(arguments[1:])
        return _end(Path(arguments[1]), int(arguments[2]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _begin(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    folder, job = _run_folder(options), job_from_environment()
    make_folder(folder.logs)
    is_training = arguments[0] == "train"
    if arguments[:2] == ["checkpoint", "reshard"]:  # it writes a checkpoint too
        take_over(folder.path, job)
    logs = make_folder(folder.logs / f"{job.incarnation}{_suffix(arguments[0], options)}")
    if is_training:
        step = _saved_step(folder)
        earlier = _begins(folder, job)
        trouble = _trouble_of_training(earlier, step)
        if trouble and step < _last_step(options):
            return _refuse(folder, job, logs, step, EXIT_BROKEN, trouble)
        try:
            take_over(folder.path, job)
        except UserError as error:
            return _refuse(folder, job, logs, step, EXIT_USER_ERROR, str(error))
        _say_what_was_before(folder, earlier)
        record_event(
            folder.jobs_file,
            "begin",
            incarnation=job.incarnation,
            job_id=job.job_id,
            chain=job.chain,
            restarts=job.restarts,
            nodes=job.nodes,
            step=step,
        )
    print(logs)
    return 0


def _refuse(folder: RunFolder, job: Job, logs: Path, step: int, code: int, reason: str) -> int:
    """Say why no rank starts, and record it as the end of this start."""
    print(f"error: {reason}", file=sys.stderr)
    _record_end(folder, job, logs, {"code": code, "reason": reason, "step": step, "action": "failed"}, True)
    return code


def _end(logs: Path, launcher_code: int) -> int:
    job, world_size = job_from_environment(), int(os.environ["PRETRAIN_WORLD_SIZE"])
    folder = RunFolder(logs.parent.parent)
    ending = how_it_ended(logs, world_size, launcher_code)
    is_training, step = logs.name == job.incarnation, _saved_step(folder)
    action, code = {0: "done", STOPPED: "stopped"}.get(ending.code, "failed"), ending.code
    reason = ending.reason
    try:
        if _wants_to_go_on(ending, job):
            trouble = _trouble_of_training(_begins(folder, job), step) if is_training else _trouble_of_others(logs, job)
            if trouble:
                action, code, reason = "failed", EXIT_BROKEN, f"{reason}; {trouble}"
            else:
                action = "requeued"
    except UserError as error:
        reason = f"{reason}; not put back into the queue, submit it again: {error}"

    def tell() -> None:
        facts = {"code": code, "reason": reason, "step": step, "action": action}
        _record_end(folder, job, logs, facts, is_training)
        where = f" (logs of each rank: {logs})" if action == "failed" else ""
        at = f" at step {step:,}" if is_training else ""
        print(f"job {job.incarnation} {action}{at}{reason and ': '}{reason}{where}", flush=True)

    tell()  # before SLURM ends this shell
    if action == "requeued":
        try:
            _until_answered(lambda: ask(["scontrol", "requeue", job.name]))
        except UserError as error:
            action, reason = "stopped", f"{reason}; not put back into the queue, submit it again: {error}"
            tell()
    return code


def _record_end(folder: RunFolder, job: Job, logs: Path, facts: dict[str, Any], is_training: bool) -> None:
    try:
        if is_training:
            record_event(
                folder.jobs_file, "end", incarnation=job.incarnation, job_id=job.job_id, restarts=job.restarts, **facts
            )
        write_json(logs / ENDING, facts)
    except OSError as error:  # what follows must still be said
        print(f"cannot write {error.filename or folder.path}: {error.strerror}", file=sys.stderr)


def _until_answered(question: Callable[[], str]) -> str:
    """
    Raises:
        UserError: SLURM does not answer for two minutes.
    """
    give_up = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            return question()
        except UserError:
            if time.monotonic() > give_up:
                raise
            time.sleep(RETRY_SECONDS)


def _suffix(verb: str, options: argparse.Namespace) -> str:
    """Of the folder of logs: a job may also evaluate what it has trained, one checkpoint after the other."""
    step = getattr(options, "checkpoint", None)
    return "" if verb == "train" else f".{verb}" if step is None else f".{verb}-{step}"


def _run_folder(options: argparse.Namespace) -> RunFolder:
    if hasattr(options, "recipe"):
        return RunFolder(Path(load_recipe(options.recipe, options.overrides).run_folder))
    if getattr(options, "folder", None) is None:
        raise UserError("launch.sh runs train, evaluate, generate and checkpoint reshard; start other verbs plainly")
    return RunFolder(options.folder.absolute())


def _last_step(options: argparse.Namespace) -> int:
    """Where this training ends; a job of a chain that comes after has nothing to do, and is not stuck."""
    steps = load_recipe(options.recipe, options.overrides).batch.train_steps
    return min(options.stop_at_step or steps, steps)


def _saved_step(folder: RunFolder) -> int:
    """The newest checkpoint's step, by its name alone: what a job has got done."""
    return max((step_of(path) for path in checkpoints_in(folder.checkpoints)), default=0)


def _begins(folder: RunFolder, job: Job) -> list[dict[str, Any]]:
    """The starts of this job, or of the array that it is a part of."""
    return [
        event
        for event in read_events(folder.jobs_file)
        if event["event"] == "begin" and event.get("chain") == job.chain
    ]


def _trouble_of_training(begins: Sequence[dict[str, Any]], step: int) -> str:
    """Why it should not start again by itself; empty if it may."""
    last = begins[-BEGINS_WITHOUT_PROGRESS:]
    if len(last) < BEGINS_WITHOUT_PROGRESS or any(event["step"] != step for event in last):
        return ""
    starts = ", ".join(event["incarnation"] for event in last)
    return (
        f"no progress in {BEGINS_WITHOUT_PROGRESS} starts in a row ({starts}): all began at step {step:,} and saved "
        "nothing newer. Give it more time, save more often (checkpoint.every_steps), and submit it again"
    )


def _trouble_of_others(logs: Path, job: Job) -> str:
    """The same of a verb that starts from its beginning each time; the first start may follow a training."""
    starts = len(list(logs.parent.glob(f"{job.job_id}.*{logs.suffix}")))
    if starts <= BEGINS_WITHOUT_PROGRESS:
        return ""
    return f"in {starts} starts of the job it was not done. Give it more time, and submit it again"


def _say_what_was_before(folder: RunFolder, earlier: Sequence[dict[str, Any]]) -> None:
    """A start that ended without a word: its node was lost, or SLURM killed it."""
    ended = {event.get("incarnation") for event in read_events(folder.jobs_file) if event["event"] == "end"}
    if earlier and earlier[-1]["incarnation"] not in ended:
        last = earlier[-1]
        print(
            f"incarnation {last['incarnation']} on {', '.join(last['nodes'])} ended without a word: node lost, "
            "preempted or killed",
            file=sys.stderr,
        )


def _wants_to_go_on(ending: Ending, job: Job) -> bool:
    """Its time is nearly over or a node is lost, and SLURM may start it again. A job that was cancelled may not.

    Raises:
        UserError: SLURM does not say.
    """
    time_is_over = "SIGUSR1" in ending.stopped_by and "STOP" not in ending.stopped_by
    if not (time_is_over or ending.lost_node):
        return False
    if _until_answered(lambda: state_of(job.job_id)) != "RUNNING":
        return False
    return " Requeue=1 " in _until_answered(lambda: ask(["scontrol", "show", "job", job.name]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
