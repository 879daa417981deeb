"""A study as one array job: job N trains and evaluates line N of a file, through ``slurm/study.sbatch``."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Sequence

from pretrain.cluster.job import record_event
from pretrain.cluster.job_script import JobRequest, job_script, site_environment
from pretrain.cluster.submit import refuse_second_job, sbatch
from pretrain.console import say
from pretrain.errors import UserError
from pretrain.files import make_folder, write_text
from pretrain.study.plan import PlannedRun
from pretrain.study.study_file import Study
from pretrain.study.study_folder import StudyFolder


def refuse_queued(folder: StudyFolder) -> None:
    """
    Raises:
        UserError: an array of this study is in the queue.
    """
    refuse_second_job(folder.path, folder.jobs_file)


def need_sbatch() -> None:
    """
    Raises:
        UserError: this machine cannot submit.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not here: submit on a login node of the cluster (--dry-run works anywhere)")


def submit_study(study: Study, plan: Sequence[PlannedRun], request: JobRequest, throttle: int | None) -> bool:
    """Submit what is left, in a folder that was claimed and whose data are prepared; False: all is done.

    Args:
        request: of each job; its name and array are the study's.
        throttle: so many jobs at a time; None: as many as SLURM likes.

    Raises:
        UserError: sbatch refuses.
    """
    folder = StudyFolder(study.folder)
    states = folder.states([run.cell for run in plan])
    left = [name for name, state in states.items() if state.state != "done"]
    for name in left:
        if states[name].state == "failed":
            say(f"{name} failed before, and is tried again: {states[name].cause}")
    if not left:
        say(f"{study.name}: all {len(plan)} runs are done")
        return False
    make_folder(folder.logs)
    lines = [shlex.quote(str(folder.recipe_file(name))) for name in left]
    write_text(folder.lines_file, f"# {study.name}: job N of the array is run N\n" + "\n".join(lines) + "\n")
    array = f"1-{len(left)}" + (f"%{throttle}" if throttle else "")
    request = dataclasses.replace(request, name=study.name, array=array)
    command = ["slurm/study.sbatch", str(folder.lines_file)]
    write_text(folder.job_script, job_script(request, folder.logs, command, site_environment(), "study"))
    job_id = sbatch(folder.job_script)
    record_event(folder.jobs_file, "submit", job_id=job_id, runs=left, nodes=request.nodes)
    say(f"{study.name}: job {job_id}, {len(left)} run(s) of {len(plan)} on {request.nodes} node(s) each")
    say(f"see it with: python -m pretrain status {folder.path}; the same command with --report writes the page")
    return True
