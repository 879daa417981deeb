"""``pretrain checkpoint``: what a run has saved, whether it is good, and taking it elsewhere.

Needs neither a GPU nor a process group; list and verify import no torch, so they answer at once.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.checkpointing.folder import (
    UNFINISHED,
    checkpoints_in,
    choose_checkpoint,
    latest_problem,
    problems_of,
    read_manifest,
    step_of,
    unless_deleted,
)
from pretrain.console import age_in_words, bytes_in_words, say
from pretrain.errors import EXIT_USER_ERROR, DamagedCheckpoint, UserError
from pretrain.files import file_sha256
from pretrain.quiet import quiet_third_party
from pretrain.run_folder import RunFolder


def list_checkpoints(options: argparse.Namespace) -> None:
    """A line for each checkpoint, oldest first, but for those that a training deletes meanwhile."""
    folder = _checkpoints_of(options.folder)
    found = [_row(path, hashed=not options.no_hash) for path in reversed(checkpoints_in(folder))]
    rows = [row for row in found if row is not None]
    if options.json:
        say(json.dumps(rows, indent=2))
        return
    table = [("step", "tokens", "layout", "size", "age", "state"), *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for step, tokens, layout, size, age, state in table:
        say(
            f"{step:>{widths[0]}}  {tokens:>{widths[1]}}  {layout:{widths[2]}}  {size:>{widths[3]}}  "
            f"{age:>{widths[4]}}  {state}"
        )
    for path in sorted(folder.glob(f"{UNFINISHED}*")):
        say(f"{path.name} is unfinished: it is being written, or the next train removes it")
    if rows and (problem := latest_problem(folder)) is not None:
        say(problem)


def verify(options: argparse.Namespace) -> int:
    """Read everything, name every bad file. Returns 2 if there is one."""
    folder = _checkpoints_of(options.folder)
    chosen = list(reversed(checkpoints_in(folder)))
    if options.step is not None:
        chosen = [path for path in chosen if step_of(path) == options.step]
    if not chosen:
        choose_checkpoint(folder, options.step)  # says what there is instead
    damaged = False
    for path in chosen:
        looked = _look(path, hashed=True)
        if looked is None:
            say(f"{path.name}: deleted meanwhile")
            if options.step is not None:
                choose_checkpoint(folder, options.step)
            continue
        for problem in looked.problems:
            say(f"{path.name}: {problem}")
        if looked.manifest is not None and not looked.problems:
            count = len(looked.manifest["files"])
            size = sum(entry["bytes"] for entry in looked.manifest["files"].values())
            say(f"{path.name}: {count} files, {bytes_in_words(size)}, all valid")
        damaged = damaged or bool(looked.problems)
    return EXIT_USER_ERROR if damaged else 0


def export(options: argparse.Namespace) -> None:
    """The whole weights of one checkpoint, and the tokenizer of the run's data."""
    folder = RunFolder(options.folder)
    recipe = folder.saved_recipe()
    checkpoint = choose_checkpoint(folder.checkpoints, options.step)
    quiet_third_party()
    import torch

    from pretrain.checkpointing.huggingface.export import export_huggingface, usable_output
    from pretrain.checkpointing.portable import PortableCheckpoint
    from pretrain.data.prepared import TOKENIZER_NAME

    output = usable_output(options.output)  # before the hashes, which take minutes
    tokenizer = Path(recipe.data.folder) / TOKENIZER_NAME
    with unless_deleted(checkpoint):
        problems = problems_of(checkpoint)  # by hash, as where it is loaded
        if problems:
            raise DamagedCheckpoint(checkpoint, problems)
        wanted = read_manifest(checkpoint)["identity"]["tokenizer_sha256"]
        if not tokenizer.is_file() or file_sha256(tokenizer) != wanted:
            raise UserError(f"{tokenizer} is not the tokenizer of this run, which belongs into the export")
        saved = PortableCheckpoint(checkpoint)
        done = export_huggingface(
            saved.tensor,
            saved.names(),
            recipe.model,
            tokenizer,
            output,
            dtype=getattr(torch, options.dtype),
        )
    if done.tokenizer_difference:
        say(f"tokenizer.json gives other ids for some texts, tokenizer.model is exact: {done.tokenizer_difference}")
    say(
        f"{recipe.name}, {checkpoint.name}: {done.tensors} tensors, {done.tensor_bytes / 1e6:,.1f} MB of "
        f"{options.dtype} in {len(done.files)} file(s) of {options.output}"
    )


def _checkpoints_of(path: Path) -> Path:
    run = RunFolder(path)
    if not run.recipe_file.is_file() and not run.checkpoints.is_dir():
        raise UserError(f"{path} is not a run: it has no recipe.yaml and no checkpoints")
    return run.checkpoints


class _Looked(NamedTuple):
    """What was found in a checkpoint; ``manifest`` is None if it cannot be read."""

    manifest: dict[str, Any] | None
    problems: list[str]
    bytes: int


def _look(checkpoint: Path, *, hashed: bool) -> _Looked | None:
    """None: it is gone by now, as training keeps only the last ones; hashing takes minutes."""
    try:
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        manifest = read_manifest(checkpoint)
        problems = problems_of(checkpoint, hashed=hashed)
    except DamagedCheckpoint as error:
        manifest, problems = None, error.problems
    except FileNotFoundError:
        if checkpoint.is_dir():
            raise
        return None
    return _Looked(manifest, problems, size) if checkpoint.is_dir() else None


def _row(checkpoint: Path, *, hashed: bool) -> dict[str, Any] | None:
    looked = _look(checkpoint, hashed=hashed)
    if looked is None:
        return None
    row: dict[str, Any] = {
        "step": step_of(checkpoint),
        "valid": not looked.problems,
        "hashed": hashed,
        "problems": looked.problems,
        "bytes": looked.bytes,
    }
    manifest = looked.manifest
    if manifest is None:
        return row
    return row | {
        "tokens": manifest["consumed_tokens"],
        "samples": manifest["consumed_samples"],
        "layout": manifest["layout"],
        "age_seconds": max(0.0, time.time() - manifest["saved_at"]),
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if not row["valid"]:
        state = "damaged: " + "; ".join(row["problems"])
    else:
        state = "valid" if row["hashed"] else "sizes are right"
    if "layout" not in row:
        return (f"{row['step']:,}", "?", "?", bytes_in_words(row["bytes"]), "?", state)
    layout = row["layout"]
    described = (
        f"tensor-parallel {layout['tensor_model_parallel_size']} x data-parallel {layout['data_parallel_size']}, "
        f"ZeRO {layout['zero_stage']}, {'bf16' if layout['bf16'] else 'fp32'}"
    )
    size, age = bytes_in_words(row["bytes"]), age_in_words(row["age_seconds"])
    return f"{row['step']:,}", f"{row['tokens']:,}", described, size, age, state
