"""The job script that ``pretrain submit`` writes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # of the repository
GRACE_SECONDS = 300  # from USR1 until the time is over: to end the step and save
SITE_OPTIONS = {  # read by sbatch itself, and stronger than a line of the script
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_RESERVATION": "reservation",
}


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What is asked of the cluster."""

    name: str
    nodes: int
    gpus_per_node: int | None
    ranks_per_node: int
    time_limit: str | None  # as SLURM writes it
    array: str | None
    options: tuple[str, ...]  # of sbatch, as they are

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def site_environment() -> dict[str, str]:
    """The environment after ``slurm/cluster.env``, or the file that PRETRAIN_CLUSTER_ENV names, where there is one.

    Raises:
        UserError: the file is not there although it was named, or the shell stops in it.
    """
    named = os.environ.get("PRETRAIN_CLUSTER_ENV")
    file = Path(named) if named else ROOT / "slurm" / "cluster.env"
    if not file.is_file():
        if named:
            raise UserError(f"PRETRAIN_CLUSTER_ENV names {named}, which is not a file")
        return dict(os.environ)
    command = ["bash", "-c", 'set -ae; source "$1" >&2; env -0', "bash", str(file.absolute())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{file} cannot be sourced by bash: {last}")
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)


def job_script(request: JobRequest, logs: Path, command: Sequence[str], site: Mapping[str, str], verb: str) -> str:
    """A script for sbatch that runs a script of the repository with its arguments, ``slurm/launch.sh train RECIPE``.

    Args:
        verb: that writes it, for people who find it.
        logs: the folder for the output of the job.
        site: see :func:`site_environment`.

    Raises:
        UserError: the folder's path would end a line of the script, or its quotes.
    """
    if re.search(r'[\x00-\x1f\x7f"\\]', str(logs.absolute())):
        problem = "which must have no double quotes, backslashes or control characters"
        raise UserError(
            f"the output of the job would be in {str(logs.absolute())!r}, {problem}: choose another output_root"
        )
    output = "slurm-%j.out" if request.array is None else "slurm-%A_%a.out"
    options = {
        "job-name": request.name,
        "nodes": request.nodes,
        "gpus-per-node": request.gpus_per_node,
        "time": request.time_limit,
        "array": request.array,
        "requeue": True,
        # To the shell alone, which tells the ranks: between two steps of a job nothing else would hear it.
        "signal": f"B:USR1@{grace_seconds(request.time_limit)}",
        "open-mode": "append",
        "output": f"{str(logs.absolute()).replace('%', '%%')}/{output}",
    } | {option: site.get(variable) or None for variable, option in SITE_OPTIONS.items()}
    lines = ["--exclusive", *(_option(key, value) for key, value in options.items() if value is not None)]
    lines += request.options  # the last word
    launch = shlex.join(["bash", *command])
    named = os.environ.get("PRETRAIN_CLUSTER_ENV")
    exports = [f"export RANKS_PER_NODE={request.ranks_per_node}"]
    exports += [f"[[ -n ${{PYTHON:-}} ]] || export PYTHON={shlex.quote(sys.executable)}"]
    exports += [f"export PRETRAIN_CLUSTER_ENV={shlex.quote(os.path.abspath(named))}"] if named else []
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Written by `python -m pretrain {verb}`.",
            *(f"#SBATCH {line}" for line in lines),
            "set -euo pipefail",
            f"cd {shlex.quote(str(ROOT))}",
            *exports,
            f"exec {launch}",
            "",
        ]
    )


def grace_seconds(time_limit: str | None) -> int:
    """At most a quarter of the time."""
    limit = None if time_limit is None else seconds_of(time_limit)
    return GRACE_SECONDS if limit is None else min(GRACE_SECONDS, limit // 4)


def seconds_of(time_limit: str) -> int | None:
    """A time as SLURM writes it: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s; None for UNLIMITED.

    Raises:
        UserError: it is none of them, or no time at all.
    """
    if time_limit.upper() in ("UNLIMITED", "INFINITE"):
        return None
    days, dash, rest = time_limit.rpartition("-")
    numbers = rest.split(":")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time_limit):
        raise UserError(f"--time is {time_limit!r}, must be minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s")
    if dash:
        hours, minutes, seconds = ([int(number) for number in numbers] + [0, 0])[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = map(int, numbers)
    else:
        hours, minutes, seconds = 0, int(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"--time is {time_limit!r}: no time at all; UNLIMITED asks for no limit")
    return total


def _option(key: str, value: object) -> str:
    """A line of the script; sbatch knows quotes."""
    if value is True:
        return f"--{key}"
    text = str(value)
    return f"--{key}={text}" if re.fullmatch(r"[\w./:@%+,=\[\]-]+", text) else f'--{key}="{text}"'
