"""The verbs as a user runs them: real processes that start their own ranks, from text to a report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pretrain.cluster.job import rendezvous_port
from pretrain.recipe_io import recipe_to_dict
from tests.small_runs import change

ROOT = Path(__file__).resolve().parents[1]


def pretrain(*arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def runs(prepared_recipe, tmp_path_factory):
    """Two trained and evaluated runs on two ranks each: plain, tensor-parallel; AGG, data-parallel."""
    root = tmp_path_factory.mktemp("pipeline")
    layouts = {"mle": {"tensor_model_parallel_size": 2}, "agg": {"data_parallel_size": 2}}
    for method, layout in layouts.items():
        recipe = change(
            prepared_recipe, name=method, output_root=str(root), objective={"method": method}, parallel=layout
        )
        path = root / f"{method}.yaml"
        path.write_text(yaml.safe_dump(recipe_to_dict(recipe)), encoding="utf-8")
        pretrain("train", str(path))
        pretrain("evaluate", str(root / method))
    return root


def test_run_folder(runs):
    for method in ("mle", "agg"):
        records = [json.loads(line) for line in (runs / method / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
        assert ("rare_fraction" in records[-1]) == (method == "agg")
        evaluation = json.loads((runs / method / "evaluation.json").read_text())
        assert evaluation["method"] == method and evaluation["checkpoint_step"] == 6
        for tree in (evaluation, evaluation["sliding_window"]):
            for key in ("perplexity", "unique_tokens"):
                assert set(tree[key]) == {"frequent", "medium", "rare", "total"}
        assert evaluation["seed"] == 1234 and evaluation["input_embedding"] is None
        assert 0 < evaluation["bits_per_byte"]["sliding_window"] < 8 and evaluation["generation"]["prompts"] > 0
        assert 0 < evaluation["isotropy"] <= 1 and evaluation["perplexity"]["total"] > 1
        config = json.loads((runs / method / "deepspeed.json").read_text())
        assert config["zero_optimization"]["stage"] == 1 and "auto" not in json.dumps(config)
        assert (runs / method / "recipe_given.yaml").read_text() == (runs / f"{method}.yaml").read_text()


def test_evaluation_agrees_with_the_validation_of_training(runs, prepared_recipe):
    """Two paths to one number: geometry of the last record, and of the checkpoint."""
    record = json.loads((runs / "agg" / "metrics.jsonl").read_text().splitlines()[-1])
    evaluation = json.loads((runs / "agg" / "evaluation.json").read_text())
    for key in ("isotropy", "mean_cosine", "mean_shift"):
        assert evaluation[key] == pytest.approx(record[key], rel=1e-9)


def test_again_does_nothing(runs):
    before = (runs / "agg" / "evaluation.json").stat().st_mtime_ns
    assert "trained already" in pretrain("train", str(runs / "agg.yaml")).stdout
    assert "evaluated already" in pretrain("evaluate", str(runs / "agg")).stdout
    assert (runs / "agg" / "evaluation.json").stat().st_mtime_ns == before


def test_report(runs):
    done = pretrain("report", str(runs / "mle"), str(runs / "agg"), "--output", str(runs / "report.html"))
    assert "isotropy" in done.stdout.lower() and "mle" in done.stdout and "agg" in done.stdout
    page = (runs / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") >= 6
    assert len(list((runs / "figures").glob("*.png"))) >= 6


def test_generate(runs):
    first = pretrain("generate", str(runs / "agg"), "--prompt", "abc", "--max-new-tokens", "5").stdout
    assert first.startswith("abc")
    assert first == pretrain("generate", str(runs / "agg"), "--prompt", "abc", "--max-new-tokens", "5").stdout
    with_noise = ["generate", str(runs / "mle"), "--prompt=-abc", "--max-new-tokens", "20", "--temperature", "2"]
    assert pretrain(*with_noise).stdout.startswith("-abc")
    assert (
        "no checkpoint of step 5; there are: 6"
        in pretrain("generate", str(runs / "agg"), "--prompt", "abc", "--checkpoint", "5", code=2).stderr
    )


def test_terminal_is_ours(runs, tmp_path):
    """No warnings of third parties: every line but the bars is one of a few known ones."""
    done = pretrain("train", str(runs / "agg.yaml"), f"output_root={tmp_path}", PATH="/nonexistent")  # no compiler
    lines = [line for line in done.stderr.replace("\r", "\n").split("\n") if line.strip()]
    assert all(line.startswith("training:") for line in lines), done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        "preflight",
        "agg",
        "2 rank(s) on CPU",
        "agg",
    ]


def start_long_run(runs, tmp_path):
    """A run of many steps on two ranks; returns its process and metrics file once it trains."""
    command = [sys.executable, "-m", "pretrain", "train", str(runs / "agg.yaml"), f"output_root={tmp_path}"]
    process = subprocess.Popen(
        [*command, "batch.train_steps=100000", "reporting.validate_every_steps=0", "reporting.geometry_every_steps=0"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "agg" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") > 3:
            return process, metrics
        time.sleep(0.1)
    process.kill()
    raise AssertionError("the run did not start: " + process.stderr.read())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_its_launcher(runs, tmp_path, number):
    process, metrics = start_long_run(runs, tmp_path)
    process.send_signal(number)
    assert process.wait(60) != 0
    time.sleep(1)
    before = metrics.stat().st_size
    time.sleep(2)
    assert metrics.stat().st_size == before


def test_two_trainings_in_one_folder(runs, tmp_path):
    process, _ = start_long_run(runs, tmp_path)
    try:
        second = pretrain(
            "train", str(runs / "agg.yaml"), f"output_root={tmp_path}", "batch.train_steps=100000",
            "reporting.validate_every_steps=0", "reporting.geometry_every_steps=0", code=2,
        )  # fmt: skip
        assert f"another process is training in {tmp_path / 'agg'}: process {process.pid} on " in second.stderr
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(60)


def test_mended_recipe_may_use_the_folder(runs, tmp_path):
    """A run that could not begin leaves nothing that stops the next."""
    recipe = str(runs / "mle.yaml")
    failed = pretrain("train", recipe, f"output_root={tmp_path}", "model.sequence_length=60000", code=2)
    assert "error: " in failed.stderr
    pretrain("train", recipe, f"output_root={tmp_path}", "batch.train_steps=1")


def test_moved_run_from_another_folder(runs, tmp_path):
    shutil.copytree(runs / "agg", tmp_path / "moved")
    (tmp_path / "moved" / "evaluation.json").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "evaluate", "moved"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved"]


def test_tensorboard(runs, tmp_path):
    pretrain("train", str(runs / "mle.yaml"), f"output_root={tmp_path}", "reporting.tensorboard=true")
    (events,) = (tmp_path / "mle" / "tensorboard").iterdir()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(events)).Reload()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "mle" / "metrics.jsonl").read_text().splitlines()]
    assert [point.value for point in board.Scalars("loss")] == pytest.approx(losses, rel=1e-6)
    assert "validation_perplexity/total" in board.Tags()["scalars"]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_joins_the_ranks_of_a_launcher(runs, tmp_path, launcher):
    """train must not start more, and evaluate must know how many there were."""
    port = rendezvous_port({"SLURM_JOB_ID": str(os.getpid())})
    commands = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"],
        "deepspeed": [
            "deepspeed.launcher.runner",
            "--num_accelerators=2",
            f"--master_port={port}",
            "--module",
        ],
    }
    (tmp_path / "open.yaml").write_text(
        (runs / "agg.yaml").read_text().replace("data_parallel_size: 2", "data_parallel_size: null")
    )
    done = subprocess.run(
        [sys.executable, "-m", *commands[launcher], "pretrain", "train", str(tmp_path / "open.yaml"),
         f"output_root={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    started = [json.loads(line)["loss"] for line in (tmp_path / "agg" / "metrics.jsonl").read_text().splitlines()]
    own = [json.loads(line)["loss"] for line in (runs / "agg" / "metrics.jsonl").read_text().splitlines()]
    assert started == own
    pretrain("evaluate", str(tmp_path / "agg"))
