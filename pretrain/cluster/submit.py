"""``pretrain submit``: check a run, write its job script, hand it to sbatch, and record the job."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pretrain.checkpointing.folder import checkpoints_in, step_of
from pretrain.checkpointing.identity import check_newest
from pretrain.cluster.job import ASK_SECONDS, read_events, record_event
from pretrain.cluster.job_script import (
    SITE_OPTIONS,
    JobRequest,
    grace_seconds,
    job_script,
    seconds_of,
    site_environment,
)
from pretrain.cluster.memory import RankMemory, memory_per_rank
from pretrain.cluster.queue import jobs_of, read_queue
from pretrain.cluster.run_records import tail_records
from pretrain.commands import check_run, is_done
from pretrain.console import bytes_in_words, say
from pretrain.data.prepared import PreparedData, steps_per_epoch
from pretrain.errors import UserError
from pretrain.files import lock_file, make_folder, write_text
from pretrain.model.size import model_size
from pretrain.quiet import quiet_third_party
from pretrain.recipe import Recipe
from pretrain.recipe_io import load_recipe, recipe_from_dict, recipe_to_dict, text_as_given
from pretrain.run_folder import RunFolder, with_whole_paths

FASTEST = 1e15  # tokens a second that --tokens-per-second takes
RATES = 20  # last records whose median rate is taken


def submit(options: argparse.Namespace) -> int:
    """See the verb; nothing is written or submitted unless all of it can be."""
    quiet_third_party()
    rate = options.tokens_per_second
    if rate is not None and not 0 < rate < FASTEST:
        raise UserError(f"--tokens-per-second is {rate}, must be above 0 and below {FASTEST:g}")
    recipe = _with_absolute_paths(load_recipe(options.recipe, options.overrides))
    site = site_environment()
    request = request_of(options, recipe, site)
    folder = RunFolder(recipe.run_folder)
    checkpoints = checkpoints_in(folder.checkpoints)
    prepared = check_run(recipe, request.world_size, folder, checkpoints)
    folder.check(recipe)
    check_newest(checkpoints, recipe, prepared, allow_changes=False)
    launch = ["slurm/launch.sh", "train", str(folder.job_recipe.absolute())]
    script = job_script(request, folder.logs, launch, site, "submit")
    if options.dry_run:
        for line in _description(recipe, request, prepared, rate):
            say(line)
        say(f"\n{folder.job_script} would be:\n\n{script}")
        return 0
    if is_done(recipe, hashed=False):
        raise UserError(f"{recipe.name} is trained already: step {recipe.batch.train_steps:,} of {recipe.run_folder}")
    job_id = _hand_over(folder, recipe, text_as_given(options.recipe, options.overrides), script, request)
    say(f"{recipe.name}: job {job_id} on {request.nodes} node(s); its output: {folder.logs}")
    say(f"see it with: python -m pretrain status {folder.path}")
    return 0


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """The job runs in the repository, wherever it was submitted."""
    tree = with_whole_paths(recipe_to_dict(recipe))
    tree["output_root"] = os.path.abspath(recipe.output_root)
    return recipe_from_dict(tree, recipe.name)


def _job_recipe(recipe: Recipe, given: str) -> str:
    """What the job trains, whatever becomes of the file that was submitted, headed by what that said."""
    comment = "".join(f"# {line}".rstrip() + "\n" for line in given.splitlines())
    return f"# As submitted:\n{comment}\n{yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False)}"


def request_of(options: argparse.Namespace, recipe: Recipe, site: dict[str, str]) -> JobRequest:
    """What the options of a command ask for, for a job of this recipe.

    Raises:
        UserError: options that contradict each other.
    """
    gpus, ranks = options.gpus_per_node, options.ranks_per_node or site.get("RANKS_PER_NODE") or options.gpus_per_node
    try:
        ranks = int(ranks or 1)
    except ValueError:
        ranks = 0
    if ranks < 1:
        raise UserError(f"RANKS_PER_NODE is {site['RANKS_PER_NODE']!r}, must be a whole number of at least 1")
    if gpus is not None and ranks > gpus and recipe.device != "cpu":
        raise UserError(f"{ranks} ranks per node, but --gpus-per-node {gpus}: each rank needs a GPU of its own")
    if options.time is not None:
        seconds_of(options.time)
    if options.array is not None and not re.fullmatch(r"[\d,:-]+%1", options.array):
        raise UserError(
            f"--array is {options.array!r}: the jobs of one run go on from each other, one at a time, as in 1-10%1"
        )
    for option in options.sbatch_option:
        if not option.startswith("-") or "\n" in option:
            raise UserError(f"--sbatch-option is {option!r}, must be an option of sbatch, as in --exclude=node7")
    return JobRequest(
        name=recipe.name,
        nodes=options.nodes,
        gpus_per_node=gpus,
        ranks_per_node=ranks,
        time_limit=options.time,
        array=options.array,
        options=tuple(options.sbatch_option),
    )


def _description(recipe: Recipe, request: JobRequest, prepared: PreparedData, rate: float | None) -> Iterator[str]:
    """What would run, a line each."""
    split = recipe.parallel.tensor_model_parallel_size
    size = model_size(recipe.model, prepared.vocab_size)
    yield (
        f"{recipe.name}: {request.nodes} node(s) x {request.ranks_per_node} rank(s) = world size {request.world_size}: "
        f"tensor-parallel {split} x data-parallel {request.world_size // split}, {recipe.parallel.sharding}, "
        f"{recipe.precision}"
    )
    if request.ranks_per_node % split:
        yield f"  tensor-parallel {split} spans nodes of {request.ranks_per_node} rank(s), which is slow"
    yield (
        f"parameters: {size.total:,} ({size.without_embeddings:,} without embeddings), vocabulary "
        f"{prepared.vocab_size:,}"
    )
    memory = memory_per_rank(recipe, request.world_size, prepared.vocab_size, steps_per_epoch(prepared, recipe))
    yield from _memory_lines(memory)
    yield f"tokens a step: {recipe.tokens_per_step:,}; {recipe.batch.train_steps:,} steps"
    yield _steps_line(recipe, request.time_limit, rate)


def _memory_lines(memory: RankMemory) -> Iterator[str]:
    yield f"memory per rank by formula: {bytes_in_words(memory.total)} on the device"
    parts = ("weights", "gradients", "optimizer", "buckets", "activations", "loss", "token_counts")
    yield "  " + ", ".join(f"{part.replace('_', ' ')} {bytes_in_words(getattr(memory, part))}" for part in parts)
    yield f"  and {bytes_in_words(memory.host)} of the host's; without the device's context and fragmentation"


def _steps_line(recipe: Recipe, time_limit: str | None, given: float | None) -> str:
    """How far a job gets before it is asked to stop; from a measured rate only."""
    folder = RunFolder(recipe.run_folder)
    limit = None if time_limit is None else seconds_of(time_limit)
    if limit is None:
        return "steps that fit: no --time is given, so the partition's limit holds"
    records, _ = tail_records(folder.metrics_file)
    rates = [record["tokens_per_second"] for record in records[-RATES:] if record.get("tokens_per_second")]
    if given is None and not rates:
        return (
            f"steps that fit into {time_limit}: unknown until measured; no rate is recorded in {folder.metrics_file}, "
            "--tokens-per-second gives one"
        )
    rate = given if given is not None else float(statistics.median(rates))
    steps = int((limit - grace_seconds(time_limit)) * rate / recipe.tokens_per_step)
    done = step_of(newest[0]) if (newest := checkpoints_in(folder.checkpoints)) else 0
    left = max(0, recipe.batch.train_steps - done)
    whence = "as given" if given is not None else f"median of the last {len(rates[-RATES:])} records of this run"
    jobs = f"{-(-left // steps):,} such job(s)" if steps else "no number of such jobs"
    return (
        f"steps that fit into {time_limit} at {rate:,.0f} tokens/s ({whence}): {steps:,}, without start-up and "
        f"saving; {left:,} are left: {jobs}"
    )


def _hand_over(folder: RunFolder, recipe: Recipe, given: str, script: str, request: JobRequest) -> str:
    """Submit and record; returns the job's number.

    Raises:
        UserError: no sbatch, it refuses, or the run has a job; then the run folder is as it was.
    """
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not here: submit on a login node of the cluster (--dry-run works anywhere)")
    new_folders = [path for path in (folder.logs, *folder.logs.parents) if not path.exists()]
    make_folder(folder.logs)
    with folder.jobs_file.open("a") as jobs_file:
        try:
            lock_file(jobs_file, f"submitting {folder.path}")
        except BlockingIOError:
            raise UserError(f"another submit of {folder.path} is under way") from None
        with _undone_on_error(folder, new_folders):
            refuse_second_job(folder.path, folder.jobs_file)
            if not folder.has_begun():
                folder.claim(recipe, given)
            write_text(folder.job_recipe, _job_recipe(recipe, given))
            write_text(folder.job_script, script)
            job_id = sbatch(folder.job_script)
        facts: dict[str, Any] = {
            "job_id": job_id,
            "nodes": request.nodes,
            "gpus_per_node": request.gpus_per_node,
            "time_limit": request.time_limit,
        }
        try:
            record_event(folder.jobs_file, "submit", **facts)
        except OSError as error:
            raise UserError(f"job {job_id} is submitted, but {folder.jobs_file} cannot be written: {error}") from error
    return job_id


def refuse_second_job(folder: Path, jobs_file: Path) -> None:
    """
    Raises:
        UserError: a job of this run or study is in the queue.
    """
    events = [event for event in read_events(jobs_file) if "job_id" in event]
    for job in jobs_of(events, (read_queue() or ()) if events else ()):
        if job.is_alive:
            raise UserError(
                f"{folder} has a job, {job.array_id} ({job.state.lower()}): wait for it, or scancel {job.array_id}"
            )


def sbatch(script: Path) -> str:
    """Hand a script to SLURM; the number of the job.

    Raises:
        UserError: no answer, or a refusal with SLURM's own words.
    """
    # What the script says in its lines must not be said again by the environment, which is stronger.
    environment = {key: value for key, value in os.environ.items() if key not in SITE_OPTIONS}
    command = ["sbatch", "--parsable", str(script)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=ASK_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"sbatch gave no answer: {error}") from error
    job_id = done.stdout.strip().partition(";")[0]
    if done.returncode or not job_id.isdigit():
        lines = (done.stderr or done.stdout).splitlines()
        words = "; ".join(line.removeprefix("sbatch: error: ").strip() for line in lines if line.strip())
        raise UserError(f"sbatch refused: {words or f'exit code {done.returncode}'}")
    return job_id


@contextlib.contextmanager
def _undone_on_error(folder: RunFolder, new_folders: Sequence[Path]) -> Iterator[None]:
    """What is written in the block goes when it raises, and the folders that were made for it."""
    files = (folder.job_script, folder.job_recipe, folder.recipe_file, folder.recipe_given_file)
    before = {file: file.read_bytes() if file.exists() else None for file in files}
    try:
        yield
    except BaseException:
        for file, content in before.items():
            if content is None:
                file.unlink(missing_ok=True)
            else:
                file.write_bytes(content)
        if folder.jobs_file.stat().st_size == 0:
            folder.jobs_file.unlink()
        for path in new_folders:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
