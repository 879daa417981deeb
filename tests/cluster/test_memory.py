"""Memory by formula against what a real tiny engine holds and autograd keeps."""

from __future__ import annotations

import gc
import itertools
import time
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from agg import VocabShard
from pretrain.cluster.memory import memory_per_rank, parameters_of_rank
from pretrain.errors import RecipeError
from pretrain.model.gpt import build_model
from pretrain.topology import connect
from pretrain.training.loop import train_step
from pretrain.training.setup import build_run
from tests.distributed import run_ranks
from tests.small_runs import change, small_recipe

BUCKET = 500_000_000  # elements, of the shipped policies


def bytes_held() -> dict[int, int]:
    """Of the tensors that Python knows, by address."""
    gc.collect()
    tensors = [entry for entry in gc.get_objects() if isinstance(entry, torch.Tensor) and entry.device.type == "cpu"]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def state_of_rank(rank, world_size, recipe):
    """Bytes of all that a rank holds between two micro-batches of its second step."""
    before = bytes_held().keys()
    run = build_run(recipe, connect(recipe))
    batch = recipe.batch
    shape = (batch.micro_batch_size, recipe.model.sequence_length)
    count = batch.global_batch_size // batch.micro_batch_size // run.topology.data_parallel_size
    micro_batches = [(torch.randint(400, shape), torch.randint(400, shape)) for _ in range(count)]
    looks, calls, backward = [], itertools.count(1), run.engine.backward

    def look():
        seen_by_python = [parameter.grad for parameter in run.engine.module.parameters()]
        looks.append(sum(size for address, size in bytes_held().items() if address not in before))
        del seen_by_python

    def spy(*args, **options):
        backward(*args, **options)
        if next(calls) == count + 1:  # the first micro-batch of the second step
            for _ in range(4):  # a thread of gloo lets go of what it reduced only after the others went on
                look()
                time.sleep(0.1)

    run.engine.backward = spy
    for _ in range(2):
        train_step(run, micro_batches)
    parameters = sum(getattr(entry, "ds_numel", entry.numel()) for entry in run.engine.module.parameters())
    return parameters, min(looks)


@pytest.mark.parametrize(
    ("sharding", "precision", "tensor_parallel"),
    [
        ("zero0", "fp32", 1),
        ("zero0", "bf16", 2),
        ("zero1", "fp32", 1),
        ("zero1", "bf16", 1),
        ("zero2", "bf16", 1),
        ("zero3", "bf16", 1),
        ("zero3", "fp32", 2),
        ("zero2_offload", "bf16", 2),
        ("zero3_offload", "bf16", 1),
    ],
)
def test_state_is_what_an_engine_holds(prepared_recipe, tmp_path, sharding, precision, tensor_parallel):
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path),
        device="cpu",
        precision=precision,
        parallel={"sharding": sharding, "tensor_model_parallel_size": tensor_parallel},
    )
    expected = memory_per_rank(recipe, 2, 500)
    parameters, held = run_ranks(state_of_rank, 2, recipe)[0]
    assert parameters_of_rank(recipe, 500) == parameters
    # DeepSpeed drops the bucket of ZeRO 2 between two backward passes.
    buckets = expected.buckets - (BUCKET * (2 if precision == "bf16" else 4) if sharding.startswith("zero2") else 0)
    state = expected.weights + expected.gradients + expected.optimizer + buckets + expected.token_counts
    # Beside it: the targets of the step, scalars of Adam, padding of parts.
    assert state + expected.host == pytest.approx(held, abs=0.02 * 16 * parameters)


def activations_of_rank(rank, world_size, recipe):
    """Bytes that autograd keeps of a forward pass up to the output head, weights left out."""
    topology = connect(recipe)
    place = (topology.tensor_parallel_rank, topology.tensor_parallel_size, topology.tensor_parallel_group)
    model = build_model(recipe.model, VocabShard.of_rank(500, *place), 512, 1)
    model.to(torch.bfloat16 if recipe.precision == "bf16" else torch.float32).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(400, (recipe.batch.micro_batch_size, recipe.model.sequence_length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = GPTModel.forward(model, tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    return sum(storage.nbytes() for storage in kept.values()) + hidden.untyped_storage().nbytes()


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize(("style", "precision"), [("gpt2", "fp32"), ("gpt2", "bf16"), ("llama", "fp32")])
def test_activations_are_what_autograd_keeps(style, precision, tensor_parallel, checkpointing):
    """Without dropout: a CPU has no flash attention with it, and keeps wider masks."""
    recipe = change(
        small_recipe(Path("text"), Path("data")),
        precision=precision,
        model={
            "style": style,
            "num_layers": 3,
            "hidden_size": 128,
            "sequence_length": 128,
            "num_query_groups": 4 if style == "gpt2" else 2,
            "activation_checkpointing": checkpointing,
        },
        parallel={"tensor_model_parallel_size": tensor_parallel},
    )
    kept = run_ranks(activations_of_rank, tensor_parallel, recipe)[0]
    tokens = recipe.batch.micro_batch_size * 128
    element = 2 if precision == "bf16" else 4
    expected = memory_per_rank(recipe, tensor_parallel, 500).activations
    if style == "llama":  # a CPU has no fused RMSNorm: it also keeps the normalised input. The sines are small
        norms, sines = (1, 0) if checkpointing == "full" else (7, 3 * 4)
        expected += norms * tokens * 128 * element + sines * 128 * 32 * element
    if checkpointing == "full":  # the formula has one layer that is run again, which is not kept here
        whole = change(recipe, model={"activation_checkpointing": "none"})
        ends = 2 * tokens * 128 * element
        expected -= (memory_per_rank(whole, tensor_parallel, 500).activations - ends) // 3
    assert kept == pytest.approx(expected, rel=0.02)


def test_more_of_it_needs_more(prepared_recipe):
    recipe = change(prepared_recipe, precision="bf16", batch={"micro_batch_size": 2, "global_batch_size": 64})

    def total(world_size=4, **sections):
        return memory_per_rank(change(recipe, **sections), world_size, 32_000, 1000).total

    base = total()
    assert total(batch={"micro_batch_size": 4}) > base
    assert total(model={"num_layers": 3}) > base
    assert total(model={"num_layers": 32, "activation_checkpointing": "full"}) < total(model={"num_layers": 32})
    assert total(model={"hidden_dropout": 0.1}) > base
    assert total(objective={"method": "mle"}) < base
    assert total(parallel={"tensor_model_parallel_size": 2}) < base
    assert total(parallel={"sharding": "zero0"}) > base  # the optimizer is not shared out
    assert total(world_size=8) < base  # but zero1 does
    assert total(world_size=8, parallel={"sharding": "zero0"}) == total(parallel={"sharding": "zero0"})
    assert total(parallel={"sharding": "zero2_offload"}) < total(parallel={"sharding": "zero2"})
    long = change(recipe, precision="fp32", batch={"micro_batch_size": 64, "global_batch_size": 256})
    assert memory_per_rank(change(long, device="cpu"), 4, 128_000).loss < memory_per_rank(long, 4, 128_000).loss


def test_window_of_counts_is_in_host_memory(prepared_recipe):
    def host(world_size, window_steps, epoch=None):
        recipe = change(prepared_recipe, objective={"window_steps": window_steps}, batch={"train_steps": 1000})
        return memory_per_rank(recipe, world_size, 500, epoch).host

    step = 8 * 256  # at most so many ids, of 8 sequences of 32
    assert host(1, 100) == 100 * step
    assert host(4, 100) == 25 * step
    assert host(1, None, epoch=50) == 50 * step
    assert host(1, None) == host(1, 5000) == 1000 * step


def test_a_world_that_does_not_fit(prepared_recipe):
    with pytest.raises(RecipeError, match="does not divide the 3 started ranks"):
        memory_per_rank(change(prepared_recipe, parallel={"tensor_model_parallel_size": 2}), 3)
