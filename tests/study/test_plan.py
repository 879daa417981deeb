"""What a plan says of each run, what it refuses, and that it starts nothing."""

from __future__ import annotations

import re

import pytest

from pretrain.__main__ import main
from pretrain.cluster.memory import memory_per_rank
from pretrain.errors import UserError
from pretrain.model.size import training_flops_per_token
from pretrain.study.plan import GIB, Resources, make_plan, plan_lines
from pretrain.study.study_file import load_study
from tests.study.studies import OBJECTIVES, SIZES, write_study


@pytest.fixture
def study(prepared_recipe, tmp_path):
    return write_study(tmp_path, prepared_recipe)


def test_numbers_of_a_run(study):
    resources = Resources(peak=1e9, utilisation=0.25)
    plan = make_plan(load_study(study), resources)
    run = next(run for run in plan if run.cell.name == "s-agg-seed2")
    recipe = run.cell.recipe
    assert run.tokens == 6 * 8 * 32 and run.world_size == 1
    assert run.flops == run.tokens * training_flops_per_token(recipe.model, 500)
    assert run.seconds == pytest.approx(run.flops / 0.25e9)
    assert run.size.total == 512 * 32 + 32 * 32 + run.size.without_embeddings
    assert run.memory.weights == memory_per_rank(recipe, 1, 500).weights == 4 * run.size.total


def test_the_table_and_nothing_started(study, capfd, tmp_path):
    assert main(["study", study, "--dry-run", "--peak-tflops", "0.001", "--mfu", "0.5"]) == 0
    lines = capfd.readouterr().out.splitlines()
    head = next(line for line in lines if line.startswith("run "))
    assert head.split() == ["run", "parameters", "embeddings", "tokens", "steps", "FLOPs", "memory/rank", "time"]
    rows = [line.split() for line in lines if "-seed" in line]
    assert len(rows) == 8 and rows[0][:5] == ["xs-plain-seed1", "15,296", "8,704", "1,536", "6"]
    assert any(line.startswith("together: 12,288 tokens, ") for line in lines)
    assert any("model FLOPs utilisation of 50%" in line for line in lines) and lines[-1] == "nothing was started"
    assert not (tmp_path / "out").exists()
    assert main(["study", study, "--dry-run"]) == 0
    assert "--peak-tflops gives it" in capfd.readouterr().out


def test_more_ranks_less_time(study):
    one, four = (
        make_plan(load_study(study, ["parallel.data_parallel_size=null"]), Resources(world_size=world, peak=1e9))[0]
        for world in (1, 4)
    )
    assert four.world_size == 4 and four.seconds == pytest.approx(one.seconds / 4)
    assert four.memory.optimizer < one.memory.optimizer  # ZeRO 1 shares it out


def test_runs_that_do_not_fit_are_all_named(study, capfd, tmp_path):
    limits = sorted({run.memory.total + run.memory.host for run in make_plan(load_study(study), Resources())})
    between = (limits[0] + limits[-1]) / 2
    assert main(["study", study, "--memory-gib", str(between / GIB), "model.num_layers=2"]) == 2
    message = capfd.readouterr().err
    assert "4 of the 8 run(s) of the study small cannot be:" in message
    for name in ("s-plain-seed1", "s-plain-seed2", "s-agg-seed1", "s-agg-seed2"):
        assert re.search(rf"  - .*\b{name}\b.*: a rank needs ", message)
    assert "xs-" not in message and not (tmp_path / "out").exists()


def test_layouts_and_shared_folders_are_checked(prepared_recipe, tmp_path):
    path = write_study(tmp_path, prepared_recipe, axes={"size": SIZES, "objective": OBJECTIVES})
    with pytest.raises(UserError, match="needs 2 ranks, but 4 were started") as error:
        make_plan(load_study(path, ["parallel.data_parallel_size=2"]), Resources(world_size=4))
    assert str(error.value).startswith("4 of the 4 run") and "xs-plain, xs-agg, s-plain, s-agg: " in str(error.value)
    vocabularies = {size: {"data.tokenizer.vocab_size": size, "data.folder": "one"} for size in (400, 500)}
    path = write_study(tmp_path, prepared_recipe, axes={"vocabulary": vocabularies})
    with pytest.raises(UserError, match="500: it has the data.folder of 400, .*but another corpus or tokenizer"):
        make_plan(load_study(path), Resources())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mfu", "1.5"], "--mfu is 1.5, must be a share of the peak"),
        (["--mfu", "0"], "--mfu is 0.0, must be a finite number above 0"),
        (["--peak-tflops", "-1"], "--peak-tflops is -1.0, must be a finite number above 0"),
        (["--slurm", "--parallel-runs", "2"], "--parallel-runs is for this machine"),
        (["--throttle", "2"], "--throttle is for --slurm"),
        (["--nodes", "2"], "--nodes is for --slurm"),
        (["--mfu", "inf"], "--mfu is inf, must be a finite number"),
    ],
)
def test_options(study, capfd, options, words):
    assert main(["study", study, "--dry-run", *options]) == 2
    assert words in capfd.readouterr().err


@pytest.mark.parametrize(("name", "runs"), [("quick", 8), ("wikitext2_ladder", 48)])
def test_shipped_studies_fit_here(name, runs):
    plan = make_plan(load_study(name), Resources())
    assert len(plan) == runs and all(run.world_size == 1 for run in plan)


def test_the_paper_study():
    """GPT-2 small to 1.5B on four nodes of eight GPUs of 80 GiB."""
    resources = Resources(world_size=32, memory_bytes=80 * GIB, peak=989e12)
    study = load_study("paper")
    plan = make_plan(study, resources)
    parameters = {run.cell.labels["size"]: run.size.total for run in plan}
    assert {size: round(count / 1e6) for size, count in parameters.items()} == {
        "small": 124, "medium": 355, "large": 774, "xl": 1558,
    }  # fmt: skip
    for run in plan:
        assert run.tokens == pytest.approx(20 * run.size.total, rel=1e-3)
    rates = {run.cell.labels["size"]: run.cell.recipe.optimizer.learning_rate for run in plan}
    assert rates["small"] == 6e-4 and rates["xl"] == pytest.approx(6e-4 * 768 / 1600)
    assert len(plan) == 24 and "24 run(s)" in "\n".join(plan_lines(study, plan, resources))
    with pytest.raises(UserError, match="6 of the 24 run"):
        make_plan(study, Resources(world_size=32, memory_bytes=12 * GIB))
