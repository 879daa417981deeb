"""The long form of the tests beside it: ``make faults``, or ``python -m tests.faults --kills 30``.

Ends with the figures; the first thing that does not hold ends it with a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.quiet import quiet_third_party

os.environ.setdefault("OMP_NUM_THREADS", "1")
quiet_third_party()

import torch  # noqa: E402

from pretrain.data.prepare import prepare  # noqa: E402
from pretrain.recipe import Recipe  # noqa: E402
from pretrain.run_folder import RunFolder  # noqa: E402
from tests.distributed import run_ranks  # noqa: E402
from tests.faults.harness import (  # noqa: E402
    DAMAGES,
    KillFigures,
    damage_each_file,
    exact,
    killed_run,
    resume_rank,
    same_state,
)
from tests.small_runs import change, small_recipe, train_on_ranks, write_corpus  # noqa: E402

STEPS = 60
LAYOUTS: list[dict[str, Any]] = [
    {"sharding": "zero1", "data_parallel_size": 2},
    {"sharding": "zero1", "tensor_model_parallel_size": 2, "background": False},
    {"sharding": "zero3", "data_parallel_size": 2, "precision": "bf16"},
    {"sharding": "zero2", "data_parallel_size": 2},
    {"sharding": "zero0", "data_parallel_size": 2, "precision": "bf16", "background": False},
    {"sharding": "zero3", "tensor_model_parallel_size": 2, "data_parallel_size": 2},
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--kills", type=int, default=36, help="over all layouts")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_corpus(root / "text.txt")
        recipe = change(
            small_recipe(root / "text.txt", root / "data"),
            batch={"train_steps": STEPS},
            model={"hidden_dropout": 0.1, "attention_dropout": 0.1},
            reporting={"geometry_every_steps": 0, "validate_every_steps": 0},
        )
        with _quiet():
            prepare(recipe)
        kills = -(-options.kills // len(LAYOUTS))
        figures = [_kill(recipe, root / str(i), layout, kills, draw) for i, layout in enumerate(LAYOUTS)]
        damages = sum(
            damage_each_file(RunFolder(root / str(i) / "killed" / "small").checkpoints / f"step_{STEPS:08d}", draw)
            for i in range(len(LAYOUTS))
        )
        resumes = _resume_from_damage(root / "0" / "calm" / "small", recipe, draw)
    total = {
        name: sum(getattr(figure, name) for figure in figures) for name in ("kills", "kills_during_save", "loaded")
    }
    lost = sum(figure.bytes_lost for figure in figures)
    seconds = sorted(second for figure in figures for second in figure.seconds_to_resume)
    print(f"kills: {total['kills']}, {total['kills_during_save']} of them during a save; all ends bit for bit the same")
    print(f"checkpoints that verified after a kill: {total['loaded']}, all of them loaded; bytes lost: {lost}")
    print(f"damages: {damages}, each named; runs that resumed past one: {resumes}, all ends bit for bit the same")
    print(f"seconds to resume: median {seconds[len(seconds) // 2]:.1f}, longest {seconds[-1]:.1f}")


def _kill(recipe: Recipe, root: Path, layout: dict[str, Any], kills: int, draw: random.Random) -> KillFigures:
    begin = time.monotonic()
    parallel = {key: value for key, value in layout.items() if key not in ("precision", "background")}
    calm = change(
        recipe,
        output_root=str(root / "calm"),
        precision=layout.get("precision", "fp32"),
        parallel=parallel,
        checkpoint={"every_steps": 2, "background": layout.get("background", True)},
    )
    killed = change(calm, output_root=str(root / "killed"))
    world_size = parallel.get("data_parallel_size", 1) * parallel.get("tensor_model_parallel_size", 1)
    with _quiet():
        train_on_ranks(calm, world_size)
        figures = killed_run(killed, world_size, kills, draw)
    assert exact(killed) == exact(calm)
    assert same_state(calm, killed, STEPS) == []
    print(f"{layout}: {figures.kills} kills, {time.monotonic() - begin:.0f} s", flush=True)
    return figures


def _resume_from_damage(run: Path, recipe: Recipe, draw: random.Random) -> int:
    """Damage each file of the newest checkpoint in each way, and train on from the one before."""
    calm = change(RunFolder(run).saved_recipe(), output_root=str(run.parent))
    files = sorted(path.name for path in (RunFolder(run).checkpoints / f"step_{STEPS:08d}").iterdir())
    for name in files:
        for damage in DAMAGES.values():
            with tempfile.TemporaryDirectory() as copies:
                shutil.copytree(run, Path(copies) / run.name)
                copy = change(calm, output_root=copies)
                damage(RunFolder(copy.run_folder).checkpoints / f"step_{STEPS:08d}" / name, draw)
                with _quiet():
                    assert run_ranks(resume_rank, 2, copy) == ["", ""]
                assert exact(copy) == exact(calm) and same_state(calm, copy, STEPS) == []
    return len(files) * len(DAMAGES)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What runs print is not shown; forked ranks print to the same files."""
    sys.stdout.flush()
    saved = [os.dup(1), os.dup(2)]
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, descriptor in zip((1, 2), saved, strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


if __name__ == "__main__":
    main()
