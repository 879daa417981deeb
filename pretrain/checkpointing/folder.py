"""Which checkpoints a run has and whether they verify; light to import, as it is asked before ranks start.

``checkpoints/step_00000100/`` holds files and, written last, their manifest. ``checkpoints/latest`` is a hint for
people and other tools: what counts is the newest checkpoint that verifies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from pretrain.errors import DamagedCheckpoint, UserError
from pretrain.files import hash_problem, json_bytes, sync_folder, write_bytes

FORMAT = 2
MANIFEST = "MANIFEST.json"
UNFINISHED = "tmp_"  # begins the name of what is being written or deleted
REPLACEMENT = "_moved"  # ends the name of what is about to replace a checkpoint of that step


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    """What a rank needs beside DeepSpeed's files."""
    return f"rank_{rank:05d}.pt"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def checkpoints_in(folder: Path) -> list[Path]:
    """All checkpoints, good or bad, the newest first; a replacement that was killed half-way is completed."""
    for new in folder.glob(f"{UNFINISHED}step_*{REPLACEMENT}"):
        final = folder / new.name.removeprefix(UNFINISHED).removesuffix(REPLACEMENT)
        if not final.exists():  # it is aside already; where both are there, the new one may not be whole
            with contextlib.suppress(OSError):  # another command does it, or it may only read
                new.rename(final)
    there = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir()]
    return sorted(there, key=step_of, reverse=True)


def choose_checkpoint(folder: Path, step: int | None, *, check: bool = True) -> Path:
    """The checkpoint of that step; None: the newest.

    Args:
        check: the sizes of its files; ranks that load it together do without, as they share that then.

    Raises:
        UserError: there is none, or it is not whole.
    """
    there = checkpoints_in(folder)
    if step is None and not there:
        raise UserError(f"{folder} has no checkpoint yet: train the run with python -m pretrain train")
    checkpoint = there[0] if step is None else folder / checkpoint_name(step)
    if checkpoint not in there:
        steps = ", ".join(str(step_of(path)) for path in reversed(there)) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}; there are: {steps}")
    if check:
        with unless_deleted(checkpoint):
            check_whole(checkpoint)
    return checkpoint


def check_whole(checkpoint: Path) -> dict[str, Any]:
    """The manifest, after every file it lists was found with its size.

    Raises:
        DamagedCheckpoint: naming everything that is missing or truncated.
    """
    problems = problems_of(checkpoint, hashed=False)
    if problems:
        whole = [step_of(path) for path in checkpoints_in(checkpoint.parent) if not problems_of(path, hashed=False)]
        raise DamagedCheckpoint(checkpoint, problems, f"The newest whole one is of step {whole[0]}" if whole else "")
    return read_manifest(checkpoint)


@contextlib.contextmanager
def unless_deleted(checkpoint: Path) -> Iterator[None]:
    """Say that the checkpoint was deleted while the block read it, where that is why the block failed.

    Raises:
        UserError: it is gone. One rank alone may find it so.
    """
    try:
        yield
    except Exception as error:
        if checkpoint.is_dir():
            raise
        raise UserError(
            f"{checkpoint} was deleted meanwhile: training keeps the last checkpoint.keep_last ones only; take a newer "
            "one, or keep more"
        ) from error


def problems_of(checkpoint: Path, *, hashed: bool = True, share: slice = slice(None)) -> list[str]:
    """What is wrong with a checkpoint, a line for each bad file; empty if it verifies.

    Args:
        hashed: also compare SHA-256, which reads everything.
        share: which files to look at, where ranks divide them; who has the first also looks for files that are none
            of the checkpoint.
    """
    try:
        files = read_manifest(checkpoint)["files"]
    except DamagedCheckpoint as error:
        return error.problems
    own = sorted(files)[share]
    problems = [problem for name in own if (problem := _size_problem(checkpoint, name, files[name]))]
    if share.start in (None, 0):
        # DeepSpeed finds files by pattern, and would take one that was put there.
        others = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*.pt")} - files.keys()
        problems += [f"{name} is not in {MANIFEST}" for name in sorted(others)]
    if hashed and not problems:
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda name: hash_problem(checkpoint, name, files[name]["sha256"]), own)
            problems = [problem for problem in found if problem]
    return problems


def write_manifest(checkpoint: Path, content: dict[str, Any]) -> None:
    """Write ``MANIFEST.json`` with a SHA-256 of itself as its last entry."""
    content = {"format": FORMAT, **content}
    write_bytes(checkpoint / MANIFEST, json_bytes({**content, "sha256": _own_sha256(content)}))


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, checked against its own hash byte for byte.

    Raises:
        DamagedCheckpoint: it cannot be read, or is not what was written.
    """
    try:
        content = (checkpoint / MANIFEST).read_bytes()
        manifest = json.loads(content)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(checkpoint, [f"{MANIFEST} is missing"]) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(checkpoint, [f"{MANIFEST} cannot be read ({error})"]) from error
    if isinstance(manifest, dict) and manifest.get("format") == 1:
        raise DamagedCheckpoint(checkpoint, [f"{MANIFEST} is of format 1, which has no hashes to verify"])
    own = manifest.pop("sha256", None) if isinstance(manifest, dict) else None
    try:
        right = own is not None and own == _own_sha256(manifest) and content == json_bytes({**manifest, "sha256": own})
    except (UnicodeEncodeError, RecursionError):  # half a surrogate pair, or deep nesting: we write neither
        right = False
    if not right:
        raise DamagedCheckpoint(checkpoint, [f"{MANIFEST} was changed: it does not have its own SHA-256"])
    assert isinstance(manifest, dict)
    return manifest


def latest_problem(folder: Path) -> str | None:
    """What is wrong with ``latest``, where there are checkpoints; it decides nothing."""
    pointer = folder / "latest"
    try:
        name = pointer.read_text(encoding="utf-8", errors="backslashreplace").strip()
    except OSError as error:
        return f"{pointer} cannot be read ({error.strerror})"
    return None if folder / name in checkpoints_in(folder) else f"{pointer} names {name[:80]!r}, which is not there"


def delete_old(folder: Path, saved_step: int, keep_last: int, keep_every_steps: int) -> None:
    """Delete what is older than the last ``keep_last`` whole checkpoints up to the one that was just saved.

    Damaged ones do not count, so that they never push out a good one; those of every ``keep_every_steps`` stay.
    """
    older = [path for path in checkpoints_in(folder) if step_of(path) <= saved_step]
    # No more are looked at: of many ranks a checkpoint is thousands of files, and of a long run many are kept.
    whole = list(islice((path for path in older if not problems_of(path, hashed=False)), keep_last + 1))
    for path in older[older.index(whole[keep_last - 1]) + 1 :] if len(whole) > keep_last else ():
        if keep_every_steps == 0 or step_of(path) % keep_every_steps:
            remove(path)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that a crash in the middle leaves none that looks like one."""
    going = checkpoint.with_name(f"{UNFINISHED}{checkpoint.name}_deleted")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    sync_folder(checkpoint.parent)
    shutil.rmtree(going, ignore_errors=True)


def remove_unfinished(folder: Path) -> list[str]:
    """Delete what a crash left half written or half deleted; its names."""
    left = sorted([*folder.glob(f"{UNFINISHED}step_*"), *folder.glob("latest.*.tmp")])
    for path in left:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in left]


def _size_problem(checkpoint: Path, name: str, entry: dict[str, Any]) -> str | None:
    size = entry["bytes"]
    try:
        there = (checkpoint / name).stat().st_size
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if there == size else f"{name} has {there:,} bytes, the manifest says {size:,}"


def _own_sha256(content: Any) -> str:
    return hashlib.sha256(json_bytes(content)).hexdigest()
