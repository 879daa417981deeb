"""A step that is not trained on leaves no trace, on any sharding; outliers; rollbacks; both after a resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import islice

import pytest
import torch

from pretrain.checkpointing.checkpoint import load_checkpoint
from pretrain.errors import NonFiniteError, SpikeError
from pretrain.run_folder import RunFolder
from tests.distributed import run_ranks
from tests.small_runs import change, read_metrics

BATCH = 3  # the poisoned one, counted from 0
SAMPLES = 8  # in a batch


def poisonous(recipe, value):
    """Patch this process: the input embedding of an id that only batch BATCH holds is ``value``.

    So one data-parallel rank alone meets it, in one of its micro-batches.
    """
    import pretrain.training.setup as setup
    from pretrain.data.loader import training_dataset
    from pretrain.data.prepared import PreparedData

    dataset = training_dataset(PreparedData.open(recipe), recipe)
    batches = [
        {int(token) for i in range(step * SAMPLES, (step + 1) * SAMPLES) for token in dataset[i]["tokens"]}
        for step in range(recipe.batch.train_steps)
    ]
    others = set().union(*(ids for step, ids in enumerate(batches) if step != BATCH))
    poison = min(batches[BATCH] - others)
    build = setup.build_model

    def build_poisoned(model_recipe, shard, padded, seed):
        model = build(model_recipe, shard, padded, seed)
        if shard.start <= poison < shard.stop:
            with torch.no_grad():
                model.embedding.word_embeddings.weight[poison - shard.start] = value
        return model

    setup.build_model = build_poisoned


class Broken:
    """Samples of which those of one batch have the same target everywhere, as a broken shard may."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __len__(self):
        return len(self._dataset)

    def __getitem__(self, index):
        entry = dict(self._dataset[index])
        if index // SAMPLES == BATCH:
            entry["labels"] = torch.full_like(entry["labels"], 7)
        return entry


def batches_of(run, wrap=lambda dataset: dataset):
    from pretrain.data.loader import TrainingBatches, training_dataset

    batch, topology = run.recipe.batch, run.topology
    return TrainingBatches(
        wrap(training_dataset(run.prepared, run.recipe)),
        micro_batch_size=batch.micro_batch_size,
        global_batch_size=batch.global_batch_size,
        data_parallel_rank=topology.data_parallel_rank,
        data_parallel_size=topology.data_parallel_size,
        consumed_samples=run.progress.consumed_samples,
    )


def state_of(run):
    """What this rank holds of weights, moments and step counts of the optimizer, and token counts."""
    optimizer = getattr(run.engine.optimizer, "optimizer", run.engine.optimizer)
    held = [list(run.engine.module.parameters()), list(optimizer.state)]
    held += [state.values() for state in optimizer.state.values()]
    return [tensor.detach().clone() for tensors in held for tensor in tensors], run.objective.state_dict()


def same(one, two):
    tensors, counts = one
    others, other_counts = two
    equal = [torch.equal(a, b) for a, b in zip(tensors, others, strict=True)]
    equal += [
        torch.equal(counts[key], other_counts[key])
        if torch.is_tensor(counts[key])
        else counts[key] == other_counts[key]
        for key in counts
    ]
    return all(equal)


def skip_and_jump(rank, world_size, recipe, is_finite):
    """Train past the bad batch twice: skipping it, and never having it."""
    from pretrain.topology import connect
    from pretrain.training.loop import train_step
    from pretrain.training.setup import build_run

    if not is_finite:
        poisonous(recipe, torch.inf)
    topology = connect(recipe)
    run = build_run(recipe, topology)
    steps = batches_of(run, Broken) if is_finite else batches_of(run)
    skipping = [train_step(run, batch) for batch in islice(steps, recipe.batch.train_steps)]
    jumping, other = [], build_run(recipe, topology)
    while other.progress.step < recipe.batch.train_steps:
        if other.progress.step == BATCH:
            other.progress = dataclasses.replace(other.progress, step=BATCH + 1, consumed_samples=(BATCH + 1) * SAMPLES)
        jumping.append(train_step(other, next(iter(batches_of(other)))))
    spikes = [step.spike for step in skipping]
    losses = [[step.loss for step in steps if step.spike is None] for steps in (skipping, jumping)]
    tokens = [step.tokens for step in jumping]
    return spikes, losses, same(state_of(run), state_of(other)), run.progress, other.progress, sum(tokens)


UNTIED = {"tied_embeddings": False}


@pytest.mark.parametrize(
    ("sharding", "precision", "tensor_parallel", "world_size", "is_finite"),
    [
        ("zero0", "fp32", 2, 4, True), ("zero0", "bf16", 1, 2, True), ("zero1", "fp32", 1, 2, True),
        ("zero1", "bf16", 2, 4, True), ("zero2", "fp32", 2, 2, True), ("zero2", "bf16", 1, 2, True),
        ("zero3", "fp32", 1, 2, True), ("zero3", "bf16", 2, 2, True), ("zero2_offload", "fp32", 1, 2, True),
        ("zero3_offload", "fp32", 1, 2, True), ("zero0", "bf16", 1, 2, False), ("zero1", "bf16", 1, 2, False),
        ("zero2_offload", "fp32", 1, 2, False), ("zero3", "fp32", 1, 2, False),
    ],
)  # fmt: skip
def test_a_skipped_batch_leaves_no_trace(prepared_recipe, sharding, precision, tensor_parallel, world_size, is_finite):
    """Bit for bit the run that never had it, with gradient accumulation wherever there is room."""
    recipe = change(
        prepared_recipe,
        precision=precision,
        model=UNTIED,
        spikes={"grad_norm_factor": 1.5, "window_steps": 3} if is_finite else {"on_nonfinite": "skip"},
        parallel={
            "sharding": sharding,
            "tensor_model_parallel_size": tensor_parallel,
            "data_parallel_size": world_size // tensor_parallel,
        },
    )
    for spikes, losses, equal, progress, jumped, tokens in run_ranks(skip_and_jump, world_size, recipe, is_finite):
        assert [spike is not None for spike in spikes] == [False] * 3 + [True] + [False] * 2
        assert spikes[BATCH].reason.startswith("the gradient norm is " if is_finite else "the loss is nan")
        assert losses[0] == losses[1] and equal
        assert progress.skipped_samples == ((3 * SAMPLES, 4 * SAMPLES),)
        assert (progress.step, progress.consumed_samples) == (jumped.step, jumped.consumed_samples) == (6, 48)
        assert progress.consumed_tokens == jumped.consumed_tokens == tokens


def roll_back_and_jump(rank, world_size, recipe):
    """A run that goes back, and one that jumps from the same checkpoint to behind the poisoned batch."""
    import pretrain.training.loop as loop
    from pretrain.topology import connect

    poisonous(recipe, torch.inf)
    topology, runs, build = connect(recipe), [], loop.build_run
    loop.build_run = lambda *arguments, **options: runs.append(build(*arguments, **options)) or runs[-1]
    loop.train(recipe, topology)
    other = build(recipe, topology)
    checkpoint, load = RunFolder(recipe.run_folder).checkpoints / "step_00000002", other.objective.load_state_dict
    saved = load_checkpoint(other.engine, checkpoint, load, topology, other.identity, recipe.seed)
    other.progress = dataclasses.replace(saved, step=BATCH + 1, consumed_samples=(BATCH + 1) * SAMPLES)
    steps = [loop.train_step(other, batch) for batch in islice(batches_of(other), 2)]
    return same(state_of(runs[0]), state_of(other)), [(step.loss, step.grad_norm) for step in steps], runs[0].progress


ROLLBACK = {"on_nonfinite": "rollback"}


def claimed(recipe, world_size, tmp_path, **sections):
    degree = recipe.parallel.tensor_model_parallel_size
    recipe = change(
        recipe,
        output_root=str(tmp_path),
        model=UNTIED,
        checkpoint={"every_steps": 2, "keep_last": 10},
        parallel={"data_parallel_size": world_size // degree},
        **sections,
    )
    RunFolder(recipe.run_folder).claim(recipe, "")
    return recipe


@pytest.mark.parametrize(
    ("sharding", "precision", "tensor_parallel"),
    [("zero0", "fp32", 1), ("zero1", "bf16", 1), ("zero1", "fp32", 2), ("zero2", "fp32", 1), ("zero3", "bf16", 1)],
)
def test_a_rollback_skips_all_since_the_checkpoint(prepared_recipe, tmp_path, sharding, precision, tensor_parallel):
    recipe = change(
        prepared_recipe,
        precision=precision,
        parallel={"sharding": sharding, "tensor_model_parallel_size": tensor_parallel},
    )
    recipe = claimed(recipe, 2, tmp_path, spikes=ROLLBACK)
    outcomes = run_ranks(roll_back_and_jump, 2, recipe)
    for equal, _, progress in outcomes:
        assert equal
        assert progress.skipped_samples == ((2 * SAMPLES, 4 * SAMPLES),)
        assert (progress.step, progress.consumed_samples) == (6, 6 * SAMPLES)
    records = read_metrics(recipe)
    assert [record["step"] for record in records] == [1, 2, 4, 5, 6]
    assert records[2]["skipped"] == {"reason": "the loss is nan", "loss": None, "grad_norm": None, "back_to_step": 2}
    assert "loss" not in records[2] and records[2]["tokens"] == records[1]["tokens"]
    assert [(record["loss"], record["grad_norm"]) for record in records[3:]] == outcomes[0][1]
    assert records[-1]["tokens"] == outcomes[0][2].consumed_tokens


def train_poisoned(rank, world_size, recipe, stop_at_step):
    from pretrain.topology import connect
    from pretrain.training.loop import train

    poisonous(recipe, torch.inf)
    train(recipe, connect(recipe), stop_at_step)


def without_speed(records):
    return [{k: v for k, v in record.items() if "second" not in k} for record in records]


@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("interrupted", ["before", "after"])
def test_a_resumed_run_skips_the_same(prepared_recipe, tmp_path, action, interrupted):
    """Stopped after the spike, or killed after it and resumed from before: the run is the undisturbed one."""
    sections = {"spikes": {"on_nonfinite": action}, "model": {"hidden_dropout": 0.1, "tied_embeddings": False}}
    whole = claimed(prepared_recipe, 2, tmp_path / "whole", spikes=sections["spikes"])
    whole = change(whole, model=sections["model"], reporting={"geometry_every_steps": 0, "validate_every_steps": 0})
    RunFolder(whole.run_folder).claim(whole, "")
    run_ranks(train_poisoned, 2, whole, None)
    part = change(whole, output_root=str(tmp_path / "part"))
    RunFolder(part.run_folder).claim(part, "")
    run_ranks(train_poisoned, 2, part, 5)
    checkpoints = RunFolder(part.run_folder).checkpoints
    if interrupted == "before":
        for step in (4, 5):
            shutil.rmtree(checkpoints / f"step_0000000{step}")
        (checkpoints / "latest").write_text("step_00000002\n")
    run_ranks(train_poisoned, 2, part, None)
    assert without_speed(read_metrics(part)) == without_speed(read_metrics(whole))
    ends = [RunFolder(recipe.run_folder).checkpoints / "step_00000006" for recipe in (whole, part)]
    manifests = [json.loads((end / "MANIFEST.json").read_text()) for end in ends]
    for key in ("step", "consumed_samples", "consumed_tokens", "skipped_samples"):
        assert manifests[0][key] == manifests[1][key]
    first = 2 if action == "rollback" else 3
    assert manifests[0]["skipped_samples"] == [[first * SAMPLES, 4 * SAMPLES]]
    for path in sorted(ends[0].glob("*model_states.pt")):
        one, two = (torch.load(end / path.name, weights_only=False)["module"] for end in ends)
        assert all(torch.equal(one[name], two[name]) for name in one if one[name] is not None)


def train_broken(rank, world_size, recipe):
    import pretrain.training.loop as loop
    from pretrain.topology import connect

    made = loop.training_dataset
    loop.training_dataset = lambda *arguments: Broken(made(*arguments))
    loop.train(recipe, connect(recipe))


@pytest.mark.parametrize(
    ("sign", "name"), [({"loss_factor": 1.04}, "loss"), ({"grad_norm_factor": 1.5}, "gradient norm")]
)
def test_an_outlier_is_skipped(prepared_recipe, tmp_path, sign, name):
    recipe = claimed(prepared_recipe, 2, tmp_path, spikes=sign | {"window_steps": 3})
    run_ranks(train_broken, 2, recipe)
    records = read_metrics(recipe)
    assert [record["step"] for record in records if "skipped" in record] == [BATCH + 1]
    assert records[BATCH]["skipped"]["reason"].startswith(f"the {name} is ")
    assert records[BATCH]["tokens"] == records[BATCH - 1]["tokens"]
    untouched = claimed(prepared_recipe, 2, tmp_path / "off")
    run_ranks(train_broken, 2, untouched)
    assert all("loss" in record for record in read_metrics(untouched))


def train_diverging(rank, world_size, recipe):
    from pretrain.topology import connect
    from pretrain.training.loop import train

    try:
        train(recipe, connect(recipe))
    except SpikeError as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(
    ("spikes", "learning_rate", "every_steps", "message"),
    [
        ({"on_nonfinite": "stop"}, 1e30, 0, "the usual ways out"),
        ({"on_nonfinite": "skip", "max_in_a_row": 2}, 1e30, 0, "after 2 skipped steps in a row"),
        ({"on_nonfinite": "rollback"}, 1e30, 0, "no checkpoint to go back to"),
        ({"on_nonfinite": "rollback", "max_in_a_row": 2}, 1e30, 1, "after 2 rollbacks in a row"),
    ],
)
def test_where_it_does_not_help_training_stops(prepared_recipe, tmp_path, spikes, learning_rate, every_steps, message):
    """A learning rate that breaks the weights themselves; all ranks say the same."""
    recipe = claimed(prepared_recipe, 2, tmp_path, spikes=spikes, optimizer={"learning_rate": learning_rate})
    recipe = change(recipe, checkpoint={"every_steps": every_steps})
    outcomes = run_ranks(train_diverging, 2, recipe)
    assert outcomes[0] == outcomes[1] and outcomes[0][0] is NonFiniteError
    assert message in outcomes[0][1]
