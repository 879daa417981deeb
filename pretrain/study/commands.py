"""``pretrain study``: plan, run here or on SLURM, go on, report."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence

from pretrain.cluster.job_script import JobRequest, site_environment
from pretrain.cluster.submit import request_of
from pretrain.console import say
from pretrain.errors import UserError
from pretrain.files import make_folder
from pretrain.quiet import quiet_third_party
from pretrain.run_lock import run_lock
from pretrain.study.plan import GIB, PlannedRun, Resources, make_plan, plan_lines
from pretrain.study.records import write_records
from pretrain.study.study_file import Study, load_study
from pretrain.study.study_folder import StudyFolder
from pretrain.training.stopping import EXIT_STOPPED


def study(options: argparse.Namespace) -> int:
    """See the verb. Nothing is written unless all runs can be."""
    quiet_third_party()
    _check_options(options)
    study = load_study(options.study, options.overrides)
    command = shlex.join(["python", "-m", "pretrain", "study", options.study, *options.overrides])
    if options.report:
        _report(study, command)
        return 0
    request = _request(study, options) if options.slurm else None
    resources = _resources(options, request)
    plan = make_plan(study, resources)
    if options.dry_run:
        StudyFolder(study.folder).check(study, [run.cell for run in plan])
        for line in plan_lines(study, plan, resources):
            say(line)
        return 0
    return _run(study, plan, options, request, command)


def _run(
    study: Study, plan: Sequence[PlannedRun], options: argparse.Namespace, request: JobRequest | None, command: str
) -> int:
    from pretrain.study.runner import prepare_data, run_locally
    from pretrain.study.slurm import need_sbatch, refuse_queued, submit_study

    if request is not None:
        need_sbatch()
    folder, cells = StudyFolder(study.folder), [run.cell for run in plan]
    refuse_queued(folder)
    folder.check(study, cells)
    folder.refuse_held(study, cells)
    make_folder(folder.path)
    with run_lock(folder.path):
        folder.claim(study, cells)
        prepare_data(plan)
        if request is not None and submit_study(study, plan, request, options.throttle):
            return 0
        code = run_locally(study, plan, options.parallel_runs) if request is None else 0
    if code != EXIT_STOPPED and any(state.state == "done" for state in folder.states(cells).values()):
        _report(study, command)
    return code


def _report(study: Study, command: str) -> None:
    from pretrain.study.study_report import report_study

    records = write_records(study.folder)
    say(f"records: {records}, report: {report_study(study.folder, study.name, study.question, command)}")


def _check_options(options: argparse.Namespace) -> None:
    """
    Raises:
        UserError: a number that is none, or options that do not go together.
    """
    for name in ("mfu", "peak_tflops", "memory_gib"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}, must be a finite number above 0")
    if options.mfu > 1:
        raise UserError(f"--mfu is {options.mfu}, must be a share of the peak, at most 1")
    if options.slurm and options.parallel_runs > 1:
        raise UserError("--parallel-runs is for this machine; with --slurm, --throttle says how many run at a time")
    if options.throttle is not None and not options.slurm:
        raise UserError("--throttle is for --slurm; on this machine --parallel-runs says how many run at a time")
    of_a_job = ("nodes", "gpus_per_node", "ranks_per_node", "time", "sbatch_option")
    given = [name for name in of_a_job if getattr(options, name) not in (None, [], 1)]
    if given and not options.slurm:
        raise UserError(f"--{given[0].replace('_', '-')} is for --slurm: add it, or leave this out")


def _request(study: Study, options: argparse.Namespace) -> JobRequest:
    from pretrain.recipe_io import load_recipe

    return request_of(options, load_recipe(study.base), site_environment())


def _resources(options: argparse.Namespace, request: JobRequest | None) -> Resources:
    return Resources(
        world_size=None if request is None else request.world_size,
        parallel_runs=options.parallel_runs if request is None else options.throttle or sys.maxsize,
        memory_bytes=None if options.memory_gib is None else options.memory_gib * GIB,
        peak=None if options.peak_tflops is None else options.peak_tflops * 1e12,
        utilisation=options.mfu,
    )
