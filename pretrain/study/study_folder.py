"""``output_root/STUDY``: what is in it, and whether it belongs to the study at hand.

study.yaml         the study as it was given, and the overrides
plan.json          its runs: points, method
recipes/RUN.yaml   the whole recipe of each run; python -m pretrain train takes it
RUN/               a run folder, with state.json (pretrain.study.state)
records.parquet    pretrain.study.records; records.csv: the same
jobs.jsonl, logs/  what was submitted to SLURM, and its output
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pretrain.checkpointing.folder import checkpoints_in, step_of
from pretrain.cluster.job_script import ROOT
from pretrain.cluster.run_records import read_run
from pretrain.commands import is_done
from pretrain.errors import UserError
from pretrain.evaluation.evaluation_file import is_evaluated
from pretrain.files import make_folder, write_json, write_text
from pretrain.recipe import Recipe
from pretrain.recipe_io import recipe_to_dict
from pretrain.run_folder import RunFolder
from pretrain.study.grid import Cell, grouped
from pretrain.study.state import RunState, read_state, write_state
from pretrain.study.study_file import Study

PLAN_FORMAT = 1


class StudyFolder:
    """Paths of one study."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study_file = path / "study.yaml"
        self.plan_file = path / "plan.json"
        self.recipes = path / "recipes"
        self.logs = path / "logs"
        self.jobs_file = path / "jobs.jsonl"
        self.job_script = path / "job.sbatch"
        self.lines_file = path / "lines.txt"
        self.records_file = path / "records.parquet"
        self.csv_file = path / "records.csv"

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.path / name)

    def recipe_file(self, name: str) -> Path:
        """Of a run."""
        return self.recipes / f"{name}.yaml"

    def claim(self, study: Study, cells: Sequence[Cell]) -> None:
        """Make the folder this study's, with a recipe and a state for each run.

        Raises:
            UserError: runs have begun with other recipes, or are trained by someone else now.
        """
        self.check(study, cells)
        self.refuse_held(study, cells)
        make_folder(self.recipes)
        write_text(self.study_file, study.text)
        tree = {
            "format": PLAN_FORMAT,
            "study": study.name,
            "question": study.question,
            "evaluate": study.evaluate,
            "axes": {axis.name: [point.label for point in axis.points] for axis in study.axes},
            "runs": {cell.name: {"labels": cell.labels, "method": cell.method} for cell in cells},
        }
        write_json(self.plan_file, tree)
        for cell in cells:
            text = yaml.safe_dump(recipe_to_dict(cell.recipe), sort_keys=False)
            write_text(self.recipe_file(cell.name), f"# {study.name}, {cell.name}\n{text}")
            folder = self.run(cell.name).path
            state = read_state(folder)
            if is_finished(self.run(cell.name), cell.recipe, study.evaluate):
                write_state(folder, state, "done")
            elif state.state == "running":
                write_state(folder, state, "preempted", "its runner or job ended without a word")
            elif state.state == "done":
                write_state(
                    folder,
                    state,
                    "preempted",
                    "checkpoints or evaluations that are wanted are not there",
                )
            elif not state.since:
                write_state(folder, state, "planned")

    def check(self, study: Study, cells: Sequence[Cell]) -> None:
        """See that the folder is this study's or free, and change nothing; raises as :meth:`claim`."""
        if (
            self.path.is_dir()
            and not self.plan_file.exists()
            and any(entry.name not in (".lock", "logs", "recipes") for entry in self.path.iterdir())
        ):
            raise UserError(f"{self.path} is not empty and not a study: give this study another name or output_root")
        changed: dict[str, list[str]] = {}
        for cell in cells:
            run = self.run(cell.name)
            if run.has_begun():
                changed[cell.name] = list(run.changes_of(cell.recipe).values())
        if any(changed.values()):
            raise UserError(
                f"the study {study.name} has changed under runs that have begun in {self.path}:\n"
                + "\n".join(grouped(changed))
                + "\nGive it back what was there, another name, or delete the folders of these runs."
            )

    def refuse_held(self, study: Study, cells: Sequence[Cell]) -> None:
        """
        Raises:
            UserError: a run is trained by someone else now.
        """
        for cell in cells:
            run = self.run(cell.name)
            holder = read_run(run.path).holder if run.path.is_dir() else None
            if holder is not None:
                raise UserError(
                    f"the run {cell.name} of {study.name} is being trained by process {holder['pid']} on "
                    f"{holder['host']}: wait until it ends"
                )

    def plan(self) -> dict[str, Any]:
        """``plan.json``.

        Raises:
            UserError: there is none, or it is of another version.
        """
        try:
            tree = json.loads(self.plan_file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is not the folder of a study: it has no {self.plan_file.name}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{self.plan_file} cannot be read: {error}") from error
        if not isinstance(tree, dict) or tree.get("format") != PLAN_FORMAT:
            found = tree.get("format") if isinstance(tree, dict) else None
            raise UserError(
                f"{self.plan_file} has format {found!r}, this version reads {PLAN_FORMAT}: run the study again, its "
                "runs are kept"
            )
        return tree

    def states(self, cells: Sequence[Cell]) -> dict[str, RunState]:
        return {cell.name: read_state(self.run(cell.name).path) for cell in cells}


def unevaluated(run: RunFolder, recipe: Recipe, evaluate: str) -> list[int]:
    """Steps of checkpoints that a study wants evaluated and are not, the newest last.

    Args:
        evaluate: see :class:`~pretrain.study.study_file.Study`.
    """
    there = checkpoints_in(run.checkpoints)
    wanted = there if evaluate == "all" else there[:1]
    return [step_of(path) for path in reversed(wanted) if not is_evaluated(run, path, recipe)]


def is_finished(run: RunFolder, recipe: Recipe, evaluate: str) -> bool:
    """Whether it is trained to its end, and every checkpoint that is wanted evaluated."""
    return is_done(recipe, hashed=False) and not unevaluated(run, recipe, evaluate)


def git_commit() -> str:
    """Of the checkout that runs, with ``+`` where it was changed; empty where there is none."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=10)
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "") if commit.returncode == 0 else ""
