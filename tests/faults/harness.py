"""Killing and damaging real runs, and what must hold afterwards."""

from __future__ import annotations

import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.checkpointing.folder import checkpoints_in, problems_of, read_manifest
from pretrain.recipe import Recipe
from pretrain.run_folder import RunFolder
from tests.distributed import run_ranks, start_ranks
from tests.small_runs import on_ranks, read_metrics, train_rank

EXACT = ("step", "tokens", "loss", "learning_rate", "grad_norm", "rare_fraction", "isotropy", "validation_perplexity")
DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": lambda path, draw: os.truncate(path, draw.randrange(1, path.stat().st_size)),
    "one bit flipped": lambda path, draw: flip_bit(path, draw.randrange(8 * path.stat().st_size)),
    "deleted": lambda path, _: path.unlink(),
    "emptied": lambda path, _: os.truncate(path, 0),
}


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def exact(recipe: Recipe) -> list[dict[str, Any]]:
    """The metrics without times. Every line must be a record, and every step there once."""
    records = read_metrics(recipe)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [{key: record.get(key) for key in EXACT} for record in records]


def differences(one: Any, two: Any, where: str = "") -> list[str]:
    """Where two trees of tensors, arrays and plain values are not bit for bit the same."""
    if type(one) is not type(two):
        return [where]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == two.dtype and torch.equal(one, two) else [where]
    if isinstance(one, np.ndarray):
        return [] if np.array_equal(one, two) else [where]
    if isinstance(one, dict):
        one, two = [(key, one[key]) for key in one], [(key, two[key]) for key in two]
    if isinstance(one, (list, tuple)):
        if len(one) != len(two):
            return [where]
        return [
            found for i, (a, b) in enumerate(zip(one, two, strict=True)) for found in differences(a, b, f"{where}/{i}")
        ]
    return [] if not isinstance(one, (int, float, str, bool)) or one == two else [where]


def same_state(recipe: Recipe, other: Recipe, step: int) -> list[str]:
    """Differences between two runs' checkpoints of a step: weights, optimizer, counts, random numbers."""
    folders = [RunFolder(run.run_folder).checkpoints / f"step_{step:08d}" for run in (recipe, other)]
    files = [sorted(path.name for path in folder.glob("*.pt")) for folder in folders]
    assert files[0] == files[1] and len(files[0]) >= 2
    return [
        found
        for name in files[0]
        for found in differences(*(torch.load(folder / name, weights_only=False) for folder in folders), where=name)
    ]


def resume_rank(rank: int, world_size: int, recipe: Recipe) -> str:
    """Train to the end, or the error that stopped this rank."""
    from pretrain.errors import UserError

    try:
        train_rank(rank, world_size, recipe)
    except UserError as error:
        return str(error)
    return ""


def load_rank(rank: int, world_size: int, recipe: Recipe, steps: list[int]) -> list[int]:
    """Load checkpoints one after the other; the steps that came out."""
    from pretrain.checkpointing.checkpoint import load_checkpoint
    from pretrain.topology import connect
    from pretrain.training.setup import build_run

    run = build_run(recipe, connect(recipe))
    checkpoints = RunFolder(recipe.run_folder).checkpoints
    return [
        load_checkpoint(
            run.engine,
            checkpoints / f"step_{step:08d}",
            run.objective.load_state_dict,
            run.topology,
            run.identity,
            recipe.seed,
        ).step
        for step in steps
    ]


@dataclass
class KillFigures:
    kills: int = 0
    kills_during_save: int = 0
    loaded: int = 0  # checkpoints that verified after a kill and were loaded
    bytes_lost: int = 0  # of checkpoints that verified before a kill, and did not after it
    seconds_to_resume: list[float] = field(default_factory=list)  # from the start of ranks to their first new record


def killed_run(recipe: Recipe, world_size: int, kills: int, draw: random.Random) -> KillFigures:
    """Train to the end through so many SIGKILLs of one rank or all, at random moments of training and of saving."""
    recipe = on_ranks(recipe, world_size)
    figures = KillFigures()
    folder = RunFolder(recipe.run_folder)
    for kill in range(kills):
        good = {path: sum(e["bytes"] for e in read_manifest(path)["files"].values()) for path in _valid(folder)}
        with tempfile.TemporaryDirectory() as returned:
            begin = time.monotonic()
            ranks = start_ranks(train_rank, world_size, returned, recipe, None)
            figures.seconds_to_resume.append(await_moment(folder, begin, ranks, saving=kill % 2 == 1, draw=draw))
            victims = ranks if draw.random() < 0.5 else [draw.choice(ranks)]
            for victim in victims:
                victim.kill()
            figures.kills += 1
            figures.kills_during_save += bool(list(folder.checkpoints.glob("tmp_step_*")))
            for rank in ranks:  # as a launcher does when a rank died
                rank.join(1.0)
                rank.kill()
                rank.join()
        # What retention deletes is not lost: a newer one verifies then.
        newest = max(_valid(folder), default=None)
        figures.bytes_lost += sum(size for path, size in good.items() if newest is None or path > newest)
        steps = [read_manifest(path)["step"] for path in _valid(folder)]
        assert run_ranks(load_rank, world_size, recipe, steps)[0] == steps
        figures.loaded += len(steps)
    assert run_ranks(resume_rank, world_size, recipe) == [""] * world_size
    return figures


def _valid(folder: RunFolder) -> list[Path]:
    return [path for path in checkpoints_in(folder.checkpoints) if not problems_of(path)]


def await_moment(
    folder: RunFolder, begin: float, processes: Sequence[Any], *, saving: bool, draw: random.Random
) -> float:
    """Return in the middle of a step some records after the start, or while a checkpoint is being written.

    Returns:
        Seconds from ``begin`` to the first new record.
    """
    resumed_step = max((read_manifest(path)["step"] for path in _valid(folder)), default=0)
    before, wanted, seconds = _inode(folder.metrics_file), draw.randint(1, 3), None
    while _alive(processes):
        time.sleep(0.001)
        if _inode(folder.metrics_file) == before:  # a run that goes on replaces the file
            continue
        lines = folder.metrics_file.read_bytes().split(b"\n")[:-1]
        if len(lines) > resumed_step and seconds is None:
            seconds = time.monotonic() - begin
        if len(lines) >= resumed_step + wanted and (not saving or list(folder.checkpoints.glob("tmp_step_*"))):
            time.sleep(draw.random() * (0.02 if saving else json.loads(lines[-1])["step_seconds"]))
            break
    assert seconds is not None and _alive(processes), "the run ended before it was killed: give it more steps"
    return seconds


def _alive(processes: Sequence[Any]) -> bool:
    """Of multiprocessing or of subprocess."""
    return all(p.poll() is None if isinstance(p, subprocess.Popen) else p.is_alive() for p in processes)


def _inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def damage_each_file(checkpoint: Path, draw: random.Random) -> int:
    """Damage each file in each way, see that it alone is named, and put it back; how many damages that were."""
    assert problems_of(checkpoint) == []
    count = 0
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        for name, damage in DAMAGES.items():
            damage(path, draw)
            (problem,) = problems_of(checkpoint)
            assert problem.startswith(f"{path.name} "), (name, problem)
            path.write_bytes(content)
            count += 1
    assert problems_of(checkpoint) == []
    return count
