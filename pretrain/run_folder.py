"""``runs/NAME``: what is in it, and whether it belongs to the recipe at hand."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pretrain.checkpointing.folder import (
    REPLACEMENT,
    UNFINISHED,
    checkpoints_in,
    choose_checkpoint,
    problems_of,
    remove_unfinished,
    step_of,
)
from pretrain.errors import DamagedCheckpoint, UserError
from pretrain.files import make_folder, sync_folder, write_text
from pretrain.recipe import Recipe
from pretrain.recipe_io import flatten, load_recipe, recipe_from_dict, recipe_to_dict

# What may differ when a run goes on: it changes nothing that is trained, or (spikes) is the way out of a stop.
FREE_SECTIONS = (
    "checkpoint", "reporting", "output_root", "parallel", "device", "spikes", "hang_timeout_minutes",
)  # fmt: skip
FREE_KEYS = ("data.folder", "data.prepare_processes", "batch.micro_batch_size", "model.activation_checkpointing")
LAYOUT_KEYS = ("parallel.", "batch.micro_batch_size")  # of those, what moves a run to another layout
# What may differ if that is asked for: the weights fit, but what is trained is another thing from here on.
CHANGEABLE_SECTIONS = ("batch", "data", "optimizer")
NOT_OF_A_RUN = (
    ".lock",
    ".incarnation",
    ".gone_back",
    "logs",
    "jobs.jsonl",
    "job.sbatch",
    "job.yaml",
    "state.json",
    "aside",
    "resharding",
    "index_cache",
)

EVALUATION_FORMAT = 4


class RunFolder:
    """Paths of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_file = path / "recipe.yaml"
        self.recipe_given_file = path / "recipe_given.yaml"
        self.deepspeed_file = path / "deepspeed.json"
        self.metrics_file = path / "metrics.jsonl"
        self.changes_file = path / "changes.jsonl"
        self.checkpoints = path / "checkpoints"
        self.evaluation_file = path / "evaluation.json"
        self.evaluation_arrays = path / "evaluation.npz"
        self.logs = path / "logs"
        self.stacks = path / "stacks"
        self.jobs_file = path / "jobs.jsonl"
        self.job_script = path / "job.sbatch"
        self.job_recipe = path / "job.yaml"  # what that trains
        self.stop_file = path / "STOP"

    def saved_recipe(self, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe the run was made with, but for ``overrides``.

        Raises:
            UserError: this is not a run folder, or an override cannot be used.
        """
        if overrides:
            return load_recipe(str(self.recipe_file), overrides)
        return recipe_from_dict(self._saved_tree(), str(self.recipe_file))

    def claim(self, recipe: Recipe, given: str, *, allow_changes: bool = False) -> None:
        """Make the folder this recipe's, or see that it is already.

        What changes, of the layout or else, is recorded in ``changes.jsonl``.

        Raises:
            UserError: another run is there, with the keys that differ; or the folder cannot be written.
        """
        self.check(recipe, allow_changes=allow_changes)
        make_folder(self.path)
        if self.has_begun():
            changes = self._differences(recipe)
            self._record([text for key, text in changes.items() if key.startswith(LAYOUT_KEYS) or not _is_free(key)])
        else:
            write_text(self.recipe_given_file, given)
        write_text(self.recipe_file, yaml.safe_dump(with_whole_paths(recipe_to_dict(recipe)), sort_keys=False))

    def check(self, recipe: Recipe, *, allow_changes: bool = False) -> None:
        """See that the folder is this recipe's or free, and change nothing.

        Args:
            allow_changes: the batch, the data and the optimizer may be others.

        Raises:
            UserError: another run is there, with the keys that differ; or it is not a run.
        """
        if self.has_begun():
            changes = self.changes_of(recipe)
            allowed = {key for key in changes if key.split(".")[0] in CHANGEABLE_SECTIONS}
            refused = [text for key, text in changes.items() if not (allow_changes and key in allowed)]
            if refused:
                way_out = " --allow-changes goes on with another batch, data or optimizer." if allowed else ""
                raise UserError(
                    f"{self.path} already holds another run:\n"
                    + "\n".join(f"  - {text}" for text in refused)
                    + f"\nGive this one another name=..., or delete {self.path}.{way_out}"
                )
        elif self.path.is_dir() and not self.recipe_file.exists() and self._content():
            raise UserError(
                f"{self.path} is not empty and not a run: give this run another name=... or empty the folder"
            )

    def changes_of(self, recipe: Recipe) -> dict[str, str]:
        """Keys in which this recipe trains something else than the run, each with "key: there X, asked for Y"."""
        free = ("model.init_from",) if checkpoints_in(self.checkpoints) else ()  # they have newer weights
        return {key: text for key, text in self._differences(recipe).items() if not (_is_free(key) or key in free)}

    def start_again(self) -> Path | None:
        """Move the whole run to ``aside/TIME``, where it stays a run folder; None if there is none."""
        return self._move_aside(self._content()) if self.recipe_file.exists() else None

    def go_back_to(self, step: int) -> Path | None:
        """Move checkpoints newer than ``step``, and their evaluations, to ``aside/TIME``; None if there is none.

        ``metrics.jsonl`` is copied there, as training drops the records after ``step``.

        Raises:
            UserError: there is no checkpoint of that step, or it does not verify.
        """
        checkpoint = choose_checkpoint(self.checkpoints, step)
        problems = problems_of(checkpoint)
        if problems:
            raise DamagedCheckpoint(checkpoint, problems)
        remove_unfinished(self.checkpoints)  # else one that would replace a newer one would become that
        newer = [path for path in checkpoints_in(self.checkpoints) if step_of(path) > step]
        aside = self._move_aside([*newer, *self._evaluations_after(step)], copied=self.metrics_file)
        write_text(self.checkpoints / "latest", checkpoint.name + "\n")
        return aside

    def replace_checkpoint(self, checkpoint: Path, new: Path) -> Path:
        """Put ``new`` in the place of a checkpoint, which moves to ``aside/TIME/checkpoints``."""
        beside = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}{REPLACEMENT}")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.move(new, beside)  # first: it may come from another disk
        aside = self._move_aside([checkpoint])
        assert aside is not None
        with contextlib.suppress(FileNotFoundError):  # another command looked just now, and has done it
            beside.rename(checkpoint)
        sync_folder(self.checkpoints)
        return aside

    def _differences(self, recipe: Recipe) -> dict[str, str]:
        """Keys whose values differ from the saved recipe's, each with "key: there X, asked for Y"."""
        saved = flatten(recipe_to_dict(self.saved_recipe()))  # keys newer than the run: defaults
        wanted = flatten(with_whole_paths(recipe_to_dict(recipe)))
        return {
            key: f"{key}: there {saved.get(key)!r}, asked for {wanted.get(key)!r}"
            for key in sorted(saved.keys() | wanted.keys())
            if saved.get(key) != wanted.get(key)
        }

    def has_begun(self) -> bool:
        """Whether something was trained, or is about to be."""
        return self.recipe_file.exists() and (self.checkpoints.exists() or self.metrics_file.exists())

    def _content(self) -> list[Path]:
        return [entry for entry in self.path.iterdir() if entry.name not in NOT_OF_A_RUN]

    def _move_aside(self, paths: list[Path], copied: Path | None = None) -> Path | None:
        if not paths:
            return None
        aside = self.path / "aside" / time.strftime("%Y-%m-%dT%H-%M-%S")
        if copied is not None and copied.exists():
            shutil.copy2(copied, make_folder(aside))  # first: a crash leaves nothing moved without it
        for path in paths:
            target = aside / path.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)  # checkpoints may be a link to another disk
        return aside

    def evaluation_files(self, checkpoint: Path) -> tuple[Path, Path]:
        """Numbers and arrays: ``evaluation.*`` of the newest checkpoint, ``evaluations/step_*`` of an older one."""
        if checkpoint.name == checkpoints_in(self.checkpoints)[0].name:
            return self.evaluation_file, self.evaluation_arrays
        stem = self.path / "evaluations" / checkpoint.name
        return stem.with_suffix(".json"), stem.with_suffix(".npz")

    def _evaluations_after(self, step: int) -> list[Path]:
        """Training may come to the same step again with other weights."""
        matches = [(path, re.match(r"step_(\d+)", path.name)) for path in (self.path / "evaluations").glob("step_*")]
        newer = [path for path, match in matches if match and int(match[1]) > step]
        try:
            newest = json.loads(self.evaluation_file.read_text(encoding="utf-8"))["checkpoint_step"] > step
        except (OSError, ValueError, LookupError, TypeError):
            newest = True  # it says of nothing that stays
        files = (self.evaluation_file, self.evaluation_arrays) if newest else ()
        return newer + [path for path in files if path.exists()]

    def _record(self, changes: list[str]) -> None:
        if changes:
            record = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "changes": changes}
            with self.changes_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def _saved_tree(self) -> dict[str, Any]:
        try:
            tree = yaml.safe_load(self.recipe_file.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is not a run: it has no recipe.yaml") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{self.recipe_file} cannot be read: {error}") from error
        if not isinstance(tree, dict):
            raise UserError(f"{self.recipe_file} is not a recipe")
        return tree


def with_whole_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """Paths that later commands need, independent of the folder that they are run in."""
    tree["data"]["folder"] = str(Path(tree["data"]["folder"]).absolute())
    sharding = Path(tree["parallel"]["sharding"])
    if sharding.is_file():
        tree["parallel"]["sharding"] = str(sharding.absolute())
    if tree["model"]["init_from"]:
        tree["model"]["init_from"] = str(Path(tree["model"]["init_from"]).absolute())
    files = tree["reporting"]["word_similarity"]
    tree["reporting"]["word_similarity"] = [str(Path(name).absolute()) for name in files]
    return tree


def _is_free(key: str) -> bool:
    return key in FREE_KEYS or key.split(".")[0] in FREE_SECTIONS
