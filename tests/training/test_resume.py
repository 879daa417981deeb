"""k + k steps equal 2k steps, bit for bit, on the same layout."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

from pretrain.checkpointing.folder import read_manifest, write_manifest
from pretrain.data.loader import training_dataset
from pretrain.data.prepared import PreparedData, steps_per_epoch
from pretrain.errors import UserError
from pretrain.run_folder import RunFolder
from tests.distributed import run_ranks
from tests.small_runs import change, read_metrics, train_on_ranks

EXACT = ("step", "tokens", "loss", "learning_rate", "grad_norm", "rare_fraction", "isotropy", "validation_perplexity")


def exact(records):
    return [{key: record.get(key) for key in EXACT} for record in records]


@pytest.mark.parametrize(
    ("stage", "tensor_parallel", "world_size", "precision"),
    [
        *product((0, 1, 2, 3), (1, 2), (2,), ("fp32", "bf16")),
        (0, 1, 1, "bf16"),
        (2, 2, 4, "fp32"),
        (3, 2, 4, "bf16"),
    ],
)
def test_two_halves_equal_the_whole(prepared_recipe, tmp_path, stage, tensor_parallel, world_size, precision):
    """With dropout, gradient accumulation where there is room for it, and a window that slides."""
    recipe = change(
        prepared_recipe,
        precision=precision,
        model={"hidden_dropout": 0.1, "attention_dropout": 0.1},
        parallel={"sharding": f"zero{stage}", "tensor_model_parallel_size": tensor_parallel},
        schedule={"warmup_steps": 2},
    )
    whole = change(recipe, output_root=str(tmp_path / "whole"))
    halves = change(recipe, output_root=str(tmp_path / "halves"))
    expected = exact(train_on_ranks(whole, world_size))
    train_on_ranks(halves, world_size, stop_at_step=3)
    assert [record["step"] for record in read_metrics(halves)] == [1, 2, 3]
    assert exact(train_on_ranks(halves, world_size)) == expected
    for path in sorted((RunFolder(whole.run_folder).checkpoints / "step_00000006").glob("*model_states.pt")):
        other = RunFolder(halves.run_folder).checkpoints / "step_00000006" / path.name
        one, two = (torch.load(file, weights_only=False)["module"] for file in (path, other))
        assert all(torch.equal(one[name], two[name]) for name in one if one[name] is not None)


def test_goes_on_with_other_activation_checkpointing(prepared_recipe, tmp_path):
    """The way out of too little memory; also from a checkpoint of a version that compared it."""
    recipe = change(
        prepared_recipe,
        model={"hidden_dropout": 0.1, "attention_dropout": 0.1},
        reporting={"geometry_every_steps": 0, "validate_every_steps": 0},  # these are also where a run stops
    )
    expected = exact(train_on_ranks(change(recipe, output_root=str(tmp_path / "whole")), 2))
    recipe = change(recipe, output_root=str(tmp_path / "changed"))
    train_on_ranks(recipe, 2, stop_at_step=2)
    checkpoint = RunFolder(recipe.run_folder).checkpoints / "step_00000002"
    manifest = read_manifest(checkpoint)
    manifest["identity"]["model"]["activation_checkpointing"] = "none"
    write_manifest(checkpoint, manifest)
    train_on_ranks(change(recipe, model={"activation_checkpointing": "full"}), 2, stop_at_step=4)
    assert exact(train_on_ranks(recipe, 2)) == expected


def test_dropout_is_on(prepared_recipe, tmp_path):
    """The exactness above means little if dropout did nothing."""
    runs = [
        train_on_ranks(
            change(
                prepared_recipe,
                output_root=str(tmp_path / str(dropout)),
                model={"hidden_dropout": dropout, "attention_dropout": dropout},
                batch={"train_steps": 2},
            ),
            1,
        )
        for dropout in (0.0, 0.1)
    ]
    assert runs[0][0]["loss"] != runs[1][0]["loss"]


def test_records_after_the_checkpoint_are_dropped(prepared_recipe, tmp_path):
    recipe = change(prepared_recipe, output_root=str(tmp_path))
    train_on_ranks(recipe, 1, stop_at_step=3)
    folder = RunFolder(recipe.run_folder)
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 4, "loss": 0}\n{"step": 5, "lo')  # a crash after the checkpoint, in the middle of a line
    assert [record["step"] for record in train_on_ranks(recipe, 1)] == [1, 2, 3, 4, 5, 6]


def test_old_checkpoints_are_deleted(prepared_recipe, tmp_path):
    recipe = change(prepared_recipe, output_root=str(tmp_path), checkpoint={"every_steps": 1, "keep_last": 2})
    train_on_ranks(recipe, 1)
    there = sorted(path.name for path in RunFolder(recipe.run_folder).checkpoints.iterdir() if path.is_dir())
    assert there == ["step_00000005", "step_00000006"]


def test_another_global_batch_is_refused_unless_asked_for(prepared_recipe, tmp_path):
    recipe = change(prepared_recipe, output_root=str(tmp_path))
    train_on_ranks(recipe, 1, stop_at_step=2)
    folder, wider = RunFolder(recipe.run_folder), change(recipe, batch={"global_batch_size": 16})
    with pytest.raises(UserError, match=r"batch.global_batch_size: there 8, asked for 16\n.*--allow-changes goes on"):
        folder.claim(wider, "")
    folder.claim(wider, "", allow_changes=True)
    assert "batch.global_batch_size: there 8, asked for 16" in json.loads(folder.changes_file.read_text())["changes"]
    with pytest.raises(UserError, match="model.num_layers"):
        folder.claim(change(wider, model={"num_layers": 3}), "", allow_changes=True)
    records = train_on_ranks(wider, 1, stop_at_step=3)
    assert records[-1]["tokens"] - records[-2]["tokens"] == 2 * (records[-2]["tokens"] - records[-3]["tokens"])


@pytest.mark.parametrize("window", ["sliding", "exponential"])
def test_the_window_stays_what_an_epoch_was(prepared_recipe, tmp_path, window):
    """A window that the recipe leaves open follows batch and data, of which others may be asked for."""
    recipe = change(prepared_recipe, output_root=str(tmp_path), objective={"window_steps": None, "window": window})
    train_on_ranks(recipe, 1, stop_at_step=2)
    checkpoints = RunFolder(recipe.run_folder).checkpoints
    wider = change(recipe, batch={"global_batch_size": 16})
    RunFolder(recipe.run_folder).claim(wider, "", allow_changes=True)
    train_on_ranks(wider, 2, stop_at_step=3)
    before, after = (
        torch.load(checkpoints / f"step_0000000{step}" / "rank_00000.pt", weights_only=False)["rank_state"]
        for step in (2, 3)
    )
    assert before["window_steps"] == after["window_steps"] == steps_per_epoch(PreparedData.open(recipe), recipe)
    assert steps_per_epoch(PreparedData.open(wider), wider) < before["window_steps"]


def test_a_smaller_global_batch_does_not_run_out_of_samples(prepared_recipe, tmp_path):
    """The steps that are done took more samples than the recipe says by now."""
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path),
        model={"sequence_length": 128},
        batch={"global_batch_size": 128, "micro_batch_size": 32, "train_steps": 6},
    )
    train_on_ranks(recipe, 1, stop_at_step=4)
    smaller = change(recipe, batch={"global_batch_size": 32})
    RunFolder(recipe.run_folder).claim(smaller, "", allow_changes=True)
    samples = len(training_dataset(PreparedData.open(smaller), smaller))
    assert samples < 4 * 128 + 2 * 32, "they would have been enough without more"
    assert [record["step"] for record in train_on_ranks(smaller, 1)] == [1, 2, 3, 4, 5, 6]


def go_on(rank, world_size, recipe, allow_changes):
    from pretrain.topology import connect
    from pretrain.training.loop import train

    return train(recipe, connect(recipe), 3, allow_changes=allow_changes).step


def options_after_resume(rank, world_size, recipe):
    from pretrain.topology import connect
    from pretrain.training.loop import load_newest
    from pretrain.training.setup import build_run

    run = build_run(recipe, connect(recipe))
    run.allows_changes = True
    assert load_newest(run, RunFolder(recipe.run_folder)) is not None
    groups = run.engine.basic_optimizer.param_groups
    clip = run.engine.optimizer.clip_grad if run.engine.zero_optimization() else run.engine.update_guard.clip_norm
    return [(group["weight_decay"], tuple(group["betas"]), group["eps"]) for group in groups], clip


@pytest.mark.parametrize(
    ("sharding", "precision"),
    [("zero0", "fp32"), ("zero1", "fp32"), ("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "fp32"), ("zero3", "bf16")],
)
def test_an_optimizer_that_was_asked_for_is_used(prepared_recipe, tmp_path, sharding, precision):
    """DeepSpeed would put the options of the checkpoint in its place."""
    recipe = change(prepared_recipe, output_root=str(tmp_path), precision=precision, parallel={"sharding": sharding})
    train_on_ranks(recipe, 2, stop_at_step=2)
    other = {"weight_decay": 0.3, "betas": (0.8, 0.9), "epsilon": 1e-7, "gradient_clipping": 0.25}
    changed = change(recipe, optimizer=other, parallel={"data_parallel_size": 2})
    (groups, clip), _ = run_ranks(options_after_resume, 2, changed)
    assert groups == [(0.3, (0.8, 0.9), 1e-7), (0.0, (0.8, 0.9), 1e-7)] and clip == 0.25


def test_another_optimizer_is_refused_unless_asked_for(prepared_recipe, tmp_path):
    """Also where only the checkpoint knows, as after data that were prepared again in the same folder."""
    recipe = change(prepared_recipe, output_root=str(tmp_path))
    train_on_ranks(recipe, 1, stop_at_step=2)
    slower = change(recipe, optimizer={"learning_rate": 1e-4})
    with pytest.raises(AssertionError, match=r"optimizer.learning_rate: saved with 0.003, now 0.0001"):
        run_ranks(go_on, 1, slower, False)
    assert run_ranks(go_on, 1, slower, True) == [3]
    with pytest.raises(AssertionError, match="objective.alpha"):
        run_ranks(go_on, 1, change(slower, objective={"alpha": 3.0}), True)
