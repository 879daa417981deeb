"""SIGKILL at random moments; the long form is ``make faults``."""

from __future__ import annotations

import random

from tests.faults.harness import exact, killed_run, same_state
from tests.small_runs import change, train_on_ranks

STEPS = 30


def test_killed_runs_end_as_the_undisturbed_one(prepared_recipe, tmp_path):
    recipe = change(
        prepared_recipe,
        batch={"train_steps": STEPS},
        model={"hidden_dropout": 0.1},
        parallel={"data_parallel_size": 2},
        checkpoint={"every_steps": 2},
        reporting={"geometry_every_steps": 0, "validate_every_steps": 0},
    )
    calm = change(recipe, output_root=str(tmp_path / "calm"))
    killed = change(recipe, output_root=str(tmp_path / "killed"))
    train_on_ranks(calm, 2)
    train_on_ranks(killed, 2, stop_at_step=2)
    figures = killed_run(killed, 2, kills=3, draw=random.Random(4))
    assert exact(killed) == exact(calm)
    assert same_state(calm, killed, STEPS) == []
    assert figures.kills == 3 and figures.loaded >= 3 and figures.bytes_lost == 0
