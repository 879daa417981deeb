"""A study of two runs as one array on the test cluster."""

from __future__ import annotations

import re

import pytest
import yaml

from pretrain.cluster.job import read_events
from pretrain.recipe_io import load_recipe, recipe_to_dict
from pretrain.study.records import read_records
from pretrain.study.state import read_state
from tests.slurm.runs import RECIPE, STEPS

pytestmark = pytest.mark.slurm


def test_a_study(runs):
    """Planned and submitted on the login host, trained and evaluated by the jobs, which also write the records."""
    base, file = runs.root / "study_base.yaml", runs.root / "study.yaml"
    layout = ("parallel.tensor_model_parallel_size=1", "parallel.data_parallel_size=1")
    recipe = load_recipe(RECIPE, runs.overrides("base", *layout))
    base.write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    tree = {
        "name": "array",
        "question": "Does it run?",
        "base": str(base),
        "output_root": str(runs.root / "studies"),
        "axes": {"objective": {"plain": {"objective.method": "mle"}, "agg": {"objective.method": "agg"}}},
    }
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    options = ("--slurm", "--throttle", "1", "--gpus-per-node", "1", "--time", "30")
    said = runs.cluster.client("python", "-m", "pretrain", "study", str(file), *options)
    job = re.search(r"job (\d+), 2 run\(s\) of 2", said)[1]
    runs.cluster.wait_for(job, "COMPLETED", seconds=240)
    folder = runs.root / "studies" / "array"
    assert {name: read_state(folder / name).state for name in ("plain", "agg")} == {"plain": "done", "agg": "done"}
    assert {event["job_id"] for event in read_events(folder / "jobs.jsonl")} == {job}
    rows = read_records(folder).to_pylist()
    assert [(row["run"], row["step"]) for row in rows] == [("plain", STEPS), ("agg", STEPS)]
    again = runs.cluster.client("python", "-m", "pretrain", "study", str(file), *options)
    assert "all 2 runs are done" in again
