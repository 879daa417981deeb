"""A run goes on on any other layout as if it had never stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from pretrain.checkpointing import checkpoint, portable_load
from pretrain.checkpointing.checkpoint import Progress
from pretrain.checkpointing.folder import latest_problem, problems_of, read_manifest
from pretrain.checkpointing.portable import PortableCheckpoint
from pretrain.checkpointing.portable_load import seed_of_resume
from pretrain.checkpointing.split import Split
from pretrain.run_folder import RunFolder
from pretrain.training.deepspeed_config import find_policy
from pretrain.training.objective import GatedObjective
from pretrain.training.stopping import STOP_SIGNALS
from tests.checkpointing.layouts import (
    BF16_SOURCES,
    KINDS,
    LAYOUTS,
    SAVED_AT,
    VARIANTS,
    Layout,
    differences,
    other,
    resume_on,
    save_on,
    variant_from,
)
from tests.distributed import run_ranks
from tests.small_runs import change, train_on_ranks
from tests.test_pipeline import pretrain

TOLERANCE = {"fp32": 2e-5, "bf16": 2e-3}  # nats per token; a sample too many changes it by more than 1e-2


def moves(variant, saved_on, root, name: str, source: Layout, target: Layout) -> list[str]:
    """What is not as it was after a move."""
    recipe, saved = variant(name), saved_on(name, source)
    resumed = resume_on(recipe, target, root, saved.checkpoint)
    return differences(saved, resumed, TOLERANCE[recipe.precision])


def test_every_layout_is_a_source_and_a_target():
    assert {other(source) for source in LAYOUTS} == set(LAYOUTS)


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_goes_on_elsewhere(variant, saved_on, tmp_path, source):
    """Weights, Adam's state and counts bit for bit, the next losses to the reduction order."""
    assert moves(variant, saved_on, tmp_path, variant_from(source), source, other(source)) == []


@pytest.mark.parametrize(("name", "source"), BF16_SOURCES)
def test_goes_on_elsewhere_in_bf16(variant, saved_on, tmp_path, name, source):
    target = Layout(source.data, source.tensor, (source.stage + 1) % 4)
    assert moves(variant, saved_on, tmp_path, name, source, target) == []


def test_four_tensor_parallel_ranks(variant, tmp_path):
    recipe = change(variant("llama"), model={"num_query_groups": 4})
    saved = save_on(recipe, Layout(4, 1, 1), tmp_path / "saved")
    resumed = resume_on(recipe, Layout(2, 2, 3), tmp_path / "resumed", saved.checkpoint)
    assert differences(saved, resumed, TOLERANCE["fp32"]) == []


@pytest.mark.long
@pytest.mark.parametrize("target", LAYOUTS, ids=str)
@pytest.mark.parametrize("source", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_from_each_to_each(variant, saved_on, tmp_path, name, source, target):
    assert moves(variant, saved_on, tmp_path, name, source, target) == []


def policy(path: Path, stage: int, **zero: object) -> str:
    """A sharding file with options that move elements within DeepSpeed's files."""
    given = json.loads(find_policy(f"zero{stage}").read_text())
    given["zero_optimization"] |= zero
    path.write_text(json.dumps(given))
    return str(path)


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (Layout(1, 2, 1), {"round_robin_gradients": True}),
        (Layout(1, 2, 2), {"parameter_alignment": True}),
        (Layout(1, 2, 3), {"sub_group_size": 5000}),
    ],
    ids=str,
)
def test_options_that_move_elements(variant, saved_on, tmp_path, layout, options):
    """The same ranks and stage, but the files are laid out otherwise: there and back."""
    recipe, saved = variant("gpt2"), saved_on("gpt2", layout)
    sharding = policy(tmp_path / "policy.json", layout.stage, **options)
    there = resume_on(recipe, layout, tmp_path / "there", saved.checkpoint, sharding)
    assert differences(saved, there, TOLERANCE["fp32"]) == []
    back = resume_on(recipe, layout, tmp_path / "back", there.checkpoint)
    assert differences(saved, back, TOLERANCE["fp32"]) == []


@pytest.mark.parametrize(("stage", "name"), [(2, "gpt2"), (3, "gpt2-bf16")])
def test_offloaded_state_moves(variant, saved_on, tmp_path, stage, name):
    recipe, saved = variant(name), saved_on(name, Layout(1, 2, stage))
    offloaded = resume_on(recipe, Layout(1, 1, stage), tmp_path, saved.checkpoint, f"zero{stage}_offload")
    tolerance = TOLERANCE[recipe.precision]
    assert differences(saved, offloaded, tolerance) == []
    back = resume_on(recipe, Layout(2, 1, 1), tmp_path, offloaded.checkpoint)
    assert differences(saved, back, tolerance) == []


def test_before_the_first_step(variant, tmp_path, monkeypatch):
    """There is no optimizer state yet."""
    monkeypatch.setattr("tests.checkpointing.layouts.SAVED_AT", 0)
    recipe = variant("llama")
    saved = save_on(recipe, Layout(1, 2, 2), tmp_path / "saved")
    for target in (Layout(2, 1, 3), Layout(1, 1, 0)):
        resumed = resume_on(recipe, target, tmp_path / "resumed", saved.checkpoint)
        assert differences(saved, resumed, TOLERANCE["fp32"]) == []


def swapped_states(self, name, kind, rank, size, part=PortableCheckpoint.part):
    other_kind = {"weight": "weight", "exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}[kind]
    return part(self, name, other_kind, rank, size).abs()  # else a square root is not a number


def one_step_too_many(optimizer, fragment, step, adam_state=portable_load._adam_state):
    return adam_state(optimizer, fragment, step + 1)


MUTANTS = {
    "the halves of the gated unit are merged as one": (
        Split,
        "merge",
        lambda split, parts: torch.cat(parts, split.dim or 0),
    ),
    "exp_avg and exp_avg_sq are swapped": (PortableCheckpoint, "part", swapped_states),
    "Adam counts one step too many": (portable_load, "_adam_state", one_step_too_many),
    "the model keeps its old weights": (portable_load, "_refresh_working_weights", lambda engine: None),
    "the data go on one sample later": (
        checkpoint,
        "Progress",
        lambda step, samples, *rest, **more: Progress(step, samples + 1, *rest, **more),
    ),
    "token counts are not loaded": (GatedObjective, "load_state_dict", lambda objective, states: None),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_move_shows(variant, saved_on, tmp_path, monkeypatch, mutant):
    """The tests above would see each of these."""
    saved = saved_on("llama", Layout(2, 1, 1))
    with monkeypatch.context() as broken:
        broken.setattr(*MUTANTS[mutant])
        resumed = resume_on(variant("llama"), Layout(1, 2, 2), tmp_path, saved.checkpoint)
    assert any(found.startswith("losses") for found in differences(saved, resumed, TOLERANCE["fp32"]))


def test_random_streams_begin_anew(variant, saved_on, tmp_path):
    """Shared by the tensor-parallel ranks of a replica, different between replicas, moments and seeds."""
    recipe, saved = variant("gpt2"), saved_on("gpt2", Layout(1, 1, 0))
    resumed = resume_on(recipe, Layout(2, 2, 1), tmp_path, saved.checkpoint)
    samples = SAVED_AT * recipe.batch.global_batch_size
    assert [rank.seed for rank in resumed.told] == [seed_of_resume(recipe.seed, rank, samples) for rank in (0, 0, 1, 1)]
    assert len({seed_of_resume(seed, rank, n) for seed in (1, 2) for rank in (0, 1) for n in (8, 16)}) == 8


def test_train_goes_on_elsewhere(prepared_recipe, tmp_path):
    """Twice, with other micro-batches: metrics without gaps, and a record of every change."""
    recipe = change(prepared_recipe, output_root=str(tmp_path / "moved"))
    alone = train_on_ranks(change(recipe, output_root=str(tmp_path / "alone")), 1)
    train_on_ranks(recipe, 2, stop_at_step=2)
    parallel = {"tensor_model_parallel_size": 2, "sharding": "zero3"}
    train_on_ranks(change(recipe, parallel=parallel, batch={"micro_batch_size": 4}), 4, stop_at_step=4)
    records = train_on_ranks(change(recipe, parallel={"sharding": "zero2"}), 1)
    for record, expected in zip(records, alone, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], abs=TOLERANCE["fp32"])
        for key in ("step", "tokens", "learning_rate", "rare_fraction"):
            assert record[key] == expected[key]
    folder = RunFolder(recipe.run_folder)
    changes = [json.loads(line)["changes"] for line in folder.changes_file.read_text().splitlines()]
    assert changes[0] == [
        "batch.micro_batch_size: there 2, asked for 4",
        "parallel.sharding: there 'zero1', asked for 'zero3'",
        "parallel.tensor_model_parallel_size: there 1, asked for 2",
    ]
    assert len(changes) == 2 and folder.saved_recipe().parallel.sharding == "zero2"


def test_reshard_ahead_of_time(prepared_recipe, tmp_path):
    """The checkpoint is then loaded as one of that layout, and the one before is kept."""
    recipe = change(prepared_recipe, output_root=str(tmp_path / "moved"))
    alone = train_on_ranks(change(recipe, output_root=str(tmp_path / "alone")), 1)
    train_on_ranks(recipe, 1, stop_at_step=3)
    folder = RunFolder(recipe.run_folder)
    overrides = ["parallel.tensor_model_parallel_size=2", "parallel.sharding=zero3"]
    saved = folder.checkpoints / "step_00000003"
    trained_on = read_manifest(saved)["trained_on"]
    done = pretrain("checkpoint", "reshard", str(folder.path), *overrides)
    assert read_manifest(saved)["trained_on"] == trained_on and trained_on["world_size"] == 1
    assert "step_00000003 is on 2 rank(s)" in done.stdout
    (before,) = folder.path.glob("aside/*/checkpoints/step_00000003")
    assert problems_of(saved) == problems_of(before) == [] and latest_problem(folder.checkpoints) is None
    one, other = PortableCheckpoint(before), PortableCheckpoint(saved)
    assert (other.layout["tensor_model_parallel_size"], other.layout["zero_stage"]) == (2, 3)
    assert all(torch.equal(one.tensor(name, kind), other.tensor(name, kind)) for name in one.names() for kind in KINDS)
    assert len(folder.changes_file.read_text().splitlines()) == 1
    parallel = {"tensor_model_parallel_size": 2, "sharding": "zero3"}
    records = train_on_ranks(change(recipe, parallel=parallel), 2)
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in alone], abs=TOLERANCE["fp32"])
    assert len(folder.changes_file.read_text().splitlines()) == 1
    refused = pretrain("checkpoint", "reshard", str(folder.path), "optimizer.weight_decay=0.5", code=2)
    assert "optimizer.weight_decay: there 0.1, asked for 0.5" in refused.stderr


@pytest.mark.parametrize("sharding", ["zero0", "zero1", "zero3"])
def test_a_path_is_no_pattern(prepared_recipe, tmp_path, sharding):
    """DeepSpeed looks for its files with glob: ``lr[1]`` would be ``lr1``, which lies beside."""
    parallel = {"sharding": sharding, "data_parallel_size": 1}
    other = change(prepared_recipe, name="lr1", output_root=str(tmp_path), seed=5, parallel=parallel)
    recipe = change(other, name="lr[1]", seed=prepared_recipe.seed)
    train_on_ranks(other, 1, stop_at_step=3)
    alone = train_on_ranks(change(recipe, output_root=str(tmp_path / "alone")), 1)
    train_on_ranks(recipe, 1, stop_at_step=3)
    assert [record["loss"] for record in train_on_ranks(recipe, 1)] == [record["loss"] for record in alone]


def reshard_that_is_asked_to_stop(rank, world_size, recipe):
    from pretrain.checkpointing.reshard import reshard
    from pretrain.topology import connect

    replace = RunFolder.replace_checkpoint

    def interrupted(self, checkpoint, new):
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        return replace(self, checkpoint, new)

    RunFolder.replace_checkpoint = interrupted
    folder = RunFolder(recipe.run_folder)
    reshard(folder, folder.checkpoints / "step_00000003", recipe, connect(recipe))


def test_reshard_is_not_stopped_between_two_renames(prepared_recipe, tmp_path):
    recipe = change(prepared_recipe, output_root=str(tmp_path))
    train_on_ranks(recipe, 1, stop_at_step=3)
    run_ranks(reshard_that_is_asked_to_stop, 1, change(recipe, parallel={"sharding": "zero3", "data_parallel_size": 1}))
    saved = RunFolder(recipe.run_folder).checkpoints / "step_00000003"
    assert problems_of(saved) == [] and PortableCheckpoint(saved).layout["zero_stage"] == 3


def reshard_that_is_killed(rank, world_size, recipe):
    from pretrain.checkpointing.reshard import reshard
    from pretrain.topology import connect

    move_aside = RunFolder._move_aside

    def killed(self, paths, copied=None):
        move_aside(self, paths, copied)
        os._exit(0)

    RunFolder._move_aside = killed
    folder = RunFolder(recipe.run_folder)
    reshard(folder, folder.checkpoints / "step_00000003", recipe, connect(recipe))


@pytest.mark.parametrize("verb", ["verify", "train"])
def test_reshard_that_is_killed_between_two_renames(prepared_recipe, tmp_path, verb):
    """The next command finds the new checkpoint, whichever it is."""
    recipe = change(prepared_recipe, output_root=str(tmp_path / "moved"))
    alone = train_on_ranks(change(recipe, output_root=str(tmp_path / "alone")), 1)
    train_on_ranks(recipe, 1, stop_at_step=3)
    moved = change(recipe, parallel={"sharding": "zero3", "data_parallel_size": 1})
    with pytest.raises(AssertionError):  # no rank answers
        run_ranks(reshard_that_is_killed, 1, moved)
    folder = RunFolder(recipe.run_folder)
    saved = folder.checkpoints / "step_00000003"
    assert not saved.exists() and list(folder.path.glob("aside/*/checkpoints/step_00000003"))
    if verb == "verify":
        assert "step_00000003" in pretrain("checkpoint", "verify", str(folder.path), "--step", "3").stdout
    else:
        records = train_on_ranks(moved, 1)
        assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in alone], abs=TOLERANCE["fp32"])
    assert problems_of(saved) == [] and PortableCheckpoint(saved).layout["zero_stage"] == 3


def test_another_precision_is_refused(variant, saved_on, tmp_path):
    saved = saved_on("gpt2", Layout(1, 1, 0))
    with pytest.raises(
        AssertionError, match=r"CheckpointError: .* trained in another precision: bf16 was False, now True"
    ):
        resume_on(change(variant("gpt2"), precision="bf16"), Layout(1, 1, 1), tmp_path, saved.checkpoint)


def test_another_model_is_refused(variant, saved_on, tmp_path, monkeypatch):
    """Also where nothing else tells: here the recipes are not compared."""
    monkeypatch.setattr(checkpoint, "check_identity", lambda *_: None)
    saved = saved_on("gpt2", Layout(1, 1, 0))
    deeper = change(variant("gpt2"), model={"num_layers": 3})
    with pytest.raises(AssertionError, match=r"another model: decoder.layers.1.* is not there"):
        resume_on(deeper, Layout(2, 1, 1), tmp_path, saved.checkpoint)
