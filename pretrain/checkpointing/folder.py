"""Which checkpoints a run has; light to import, as it is asked before ranks start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pretrain.errors import UserError


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def latest_checkpoint(folder: Path) -> Path | None:
    """What ``latest`` names; None if nothing was saved.

    Raises:
        UserError: ``latest`` names a checkpoint that is not there or not whole.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return None
    checkpoint = folder / pointer.read_text(encoding="utf-8").strip()
    check_whole(checkpoint)
    return checkpoint


def choose_checkpoint(folder: Path, step: int | None) -> Path:
    """The checkpoint of that step; None: the latest.

    Raises:
        UserError: there is none.
    """
    if step is not None:
        checkpoint = folder / checkpoint_name(step)
        if checkpoint.is_dir():
            check_whole(checkpoint)
            return checkpoint
        there = ", ".join(sorted(str(int(path.name[5:])) for path in folder.glob("step_*"))) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}; there are: {there}")
    latest = latest_checkpoint(folder)
    if latest is None:
        raise UserError(f"{folder} has no checkpoint yet: train the run with python -m pretrain train")
    return latest


def check_whole(checkpoint: Path) -> dict[str, Any]:
    """The manifest, after every file it lists was found with its size.

    Raises:
        UserError: naming the first thing that is missing or truncated.
    """
    try:
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text(encoding="utf-8"))
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{checkpoint} is not whole: its MANIFEST.json cannot be read ({error})") from error
    for name, size in files:
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{checkpoint} is not whole: {name} is missing")
        if path.stat().st_size != size:
            raise UserError(f"{path} has {path.stat().st_size} bytes, the manifest says {size}")
    assert isinstance(manifest, dict)
    return manifest
