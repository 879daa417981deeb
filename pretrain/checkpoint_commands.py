"""``pretrain checkpoint``: what a run has saved, whether it is good, and taking it elsewhere.

Needs neither a GPU nor a process group; list and verify import no torch, so they answer at once.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from pretrain.checkpointing.folder import (
    UNFINISHED,
    checkpoints_in,
    choose_checkpoint,
    latest_problem,
    problems_of,
    read_manifest,
    step_of,
)
from pretrain.console import age_in_words, bytes_in_words, say
from pretrain.errors import EXIT_USER_ERROR, DamagedCheckpoint, UserError
from pretrain.files import file_sha256
from pretrain.quiet import quiet_third_party
from pretrain.run_folder import RunFolder


def list_checkpoints(options: argparse.Namespace) -> None:
    """A line for each checkpoint, oldest first."""
    folder = _checkpoints_of(options.folder)
    rows = [_row(path, hashed=not options.no_hash) for path in reversed(checkpoints_in(folder))]
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
    found = {path: problems_of(path) for path in chosen}
    for path, problems in found.items():
        for problem in problems:
            say(f"{path.name}: {problem}")
        if not problems:
            files = read_manifest(path)["files"].values()
            say(f"{path.name}: {len(files)} files, {bytes_in_words(sum(entry['bytes'] for entry in files))}, all valid")
    return EXIT_USER_ERROR if any(found.values()) else 0


def export(options: argparse.Namespace) -> None:
    """The whole weights of one checkpoint, and the tokenizer of the run's data."""
    folder = RunFolder(options.folder)
    recipe = folder.saved_recipe()
    checkpoint = choose_checkpoint(folder.checkpoints, options.step)
    problems = problems_of(checkpoint)  # by hash, as where it is loaded
    if problems:
        raise DamagedCheckpoint(checkpoint, problems)
    quiet_third_party()
    import torch

    from pretrain.checkpointing.huggingface.export import export_huggingface
    from pretrain.checkpointing.portable import PortableCheckpoint
    from pretrain.data.prepared import TOKENIZER_NAME

    tokenizer = Path(recipe.data.folder) / TOKENIZER_NAME
    if not tokenizer.is_file() or file_sha256(tokenizer) != read_manifest(checkpoint)["identity"]["tokenizer_sha256"]:
        raise UserError(f"{tokenizer} is not the tokenizer of this run, which belongs into the export")
    saved = PortableCheckpoint(checkpoint)
    done = export_huggingface(
        saved.tensor,
        saved.names(),
        recipe.model,
        tokenizer,
        options.output,
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


def _row(checkpoint: Path, *, hashed: bool) -> dict[str, Any]:
    problems = problems_of(checkpoint, hashed=hashed)
    row: dict[str, Any] = {"step": step_of(checkpoint), "valid": not problems, "hashed": hashed, "problems": problems}
    row["bytes"] = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    try:
        manifest = read_manifest(checkpoint)
    except DamagedCheckpoint:
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
