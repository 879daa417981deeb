"""The same through ``python -m pretrain train``: the launcher, its ranks, and the lock of the run folder."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from pretrain.checkpointing.folder import checkpoints_in, problems_of
from pretrain.recipe_io import recipe_to_dict
from pretrain.run_folder import RunFolder
from tests.faults.harness import await_moment, exact, same_state
from tests.small_runs import change, train_on_ranks

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60


def test_the_same_command_again_goes_on(prepared_recipe, tmp_path):
    """Rank 1 is killed while it trains, then launcher and ranks at once while they save."""
    calm = change(
        prepared_recipe,
        output_root=str(tmp_path / "calm"),
        batch={"train_steps": STEPS},
        checkpoint={"every_steps": 2},
        parallel={"data_parallel_size": 2},
        reporting={"geometry_every_steps": 0, "validate_every_steps": 0},
    )
    train_on_ranks(calm, 2)
    recipe = change(calm, output_root=str(tmp_path / "killed"))
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)), encoding="utf-8")
    folder, draw = RunFolder(recipe.run_folder), random.Random(1)

    for saving in (False, True):
        launcher = start(path)
        await_moment(folder, time.monotonic(), [launcher], saving=saving, draw=draw)
        ranks = children(launcher.pid)
        assert len(ranks) == 2
        if saving:
            os.killpg(launcher.pid, signal.SIGKILL)
            assert launcher.wait(60) == -signal.SIGKILL
        else:
            os.kill(ranks[1], signal.SIGKILL)
            assert launcher.wait(60) == 128 + signal.SIGKILL
            assert "rank 1 ended with exit code 137" in launcher.stderr.read()
        assert all(not problems_of(checkpoint) for checkpoint in checkpoints_in(folder.checkpoints))

    launcher = start(path)
    assert launcher.wait(240) == 0, launcher.stderr.read()
    assert exact(recipe) == exact(calm) and same_state(calm, recipe, STEPS) == []


def start(recipe: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pretrain", "train", str(recipe)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def children(process: int) -> list[int]:
    """In the order of their start: rank 0 first."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
