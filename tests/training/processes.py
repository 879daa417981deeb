"""Real processes of ``python -m pretrain`` that a test signals."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from pretrain.recipe import Recipe
from pretrain.recipe_io import recipe_to_dict

ROOT = Path(__file__).resolve().parents[2]

# The launcher starts ranks with "-m pretrain"; here it starts the given script instead.
_LAUNCH_SCRIPT = """
import runpy, subprocess, sys
sys.argv = sys.argv[1:]
import pretrain.launch as launch
class Popen(subprocess.Popen):
    def __init__(self, command, **options):
        super().__init__([command[0], sys.argv[0], *command[3:]], **options)
launch.subprocess = type("subprocess", (), {**vars(subprocess), "Popen": Popen})
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Rank 1 sleeps instead of its third step; rank 0 waits for it in the collective of that step.
_HANGING = """
import sys, time
import pretrain.training.loop as loop
from pretrain.__main__ import main
from pretrain.training.watchdog import Watchdog
expect = Watchdog.expect
def late_on_rank_0(self, what, patience=1.0):
    if what == "step 3" and self._rank == 0:
        time.sleep(1.5)  # as where its disk is slow
    expect(self, what, patience)
Watchdog.expect = late_on_rank_0
trained = loop.train_step
def deaf_rank(run, *arguments):
    if run.progress.step == 2 and run.topology.rank == 1:
        time.sleep(3600)
    return trained(run, *arguments)
loop.train_step = deaf_rank
sys.exit(main(sys.argv[1:]))
"""


def with_a_compiler() -> dict[str, str]:
    """The environment as a user has it, where :func:`pretrain.quiet.quiet_third_party` has not turned Dynamo off."""
    return {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}


def start(*arguments: str, script: str = "") -> subprocess.Popen[str]:
    """``python -m pretrain`` in a process group of its own; its ranks run ``script`` if one is given."""
    return subprocess.Popen(
        [sys.executable, *(["-c", _LAUNCH_SCRIPT, script] if script else ["-m", "pretrain"]), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def write_recipe(recipe: Recipe, folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)), encoding="utf-8")
    return str(path)


def hanging_script(folder: Path) -> str:
    path = folder / "hang.py"
    path.write_text(_HANGING)
    return str(path)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 300.0) -> None:
    """Wait for something that a running process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            output, errors = process.communicate()
            raise AssertionError(f"exit code {process.returncode}\n{output}{errors}")
        time.sleep(0.02)


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and what was printed."""
    output, errors = process.communicate(timeout=300)
    return process.returncode, output + errors


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that a launcher started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()] if children.exists() else []
