"""Hugging Face folders: transformers computes what we compute, and a run starts with what was written."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agg import VocabShard
from agg.vocab_shard import padded_vocab_size
from pretrain.checkpointing.huggingface.export import export_huggingface
from pretrain.checkpointing.huggingface.initial_weights import check_initial_weights, load_initial_weights
from pretrain.data.prepare import TOKENIZER_NAME, PreparedData
from pretrain.errors import UserError
from pretrain.recipe import ModelRecipe
from tests.distributed import run_ranks
from tests.small_runs import change

VOCAB = 500  # of prepared_recipe; padded to 512
SMALL = {"num_layers": 2, "hidden_size": 32, "sequence_length": 32}
MODELS = {
    "gpt2": ModelRecipe(**SMALL, num_attention_heads=4, norm_epsilon=1e-3),
    "gpt2-untied": ModelRecipe(**SMALL, num_attention_heads=4, tied_embeddings=False, ffn_hidden_size=72),
    "llama": ModelRecipe(
        **SMALL, style="llama", num_attention_heads=8, num_query_groups=4, norm_epsilon=1e-3, rope_base=500
    ),
    "llama-tied": ModelRecipe(**SMALL, style="llama", num_attention_heads=4, num_query_groups=2, tied_embeddings=True),
}
GROUPED_GPT2 = ModelRecipe(**SMALL, num_attention_heads=4, num_query_groups=2)
each_model = pytest.mark.parametrize("name", MODELS)


def with_model(recipe, model):
    return change(recipe, model=vars(model))


def tokenizer_file(recipe):
    return Path(recipe.data.folder) / TOKENIZER_NAME


def build(recipe, tensor_parallel_size, seed):
    from pretrain.model.gpt import build_model
    from pretrain.topology import connect

    topology = connect(change(recipe, parallel={"tensor_model_parallel_size": tensor_parallel_size}))
    rank, group = topology.tensor_parallel_rank, topology.tensor_parallel_group
    shard = VocabShard.of_rank(VOCAB, rank, tensor_parallel_size, group)
    return build_model(recipe.model, shard, padded_vocab_size(VOCAB, 128), seed).eval(), shard, rank


def tokens():
    return torch.randint(VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def all_logits(module):
    """[B, S, V]; the model gives those of the last position only."""
    return torch.stack([module(tokens()[:, :length]) for length in range(1, 33)], dim=1)


@torch.no_grad()
def random_model(rank, world_size, recipe):
    """Every parameter, biases and norms too, far from where it starts; all logits; and a greedy continuation."""
    module, _, _ = build(recipe, 1, seed=3)
    torch.manual_seed(4)
    for parameter in module.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    ids = tokens()[:1, :6]
    while ids.shape[1] < 32:
        ids = torch.cat([ids, module(ids).argmax(1, keepdim=True)], dim=1)
    weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    return weights, all_logits(module), ids


def write(recipe, weights, output, **options):
    return export_huggingface(
        weights.__getitem__, weights, recipe.model, tokenizer_file(recipe), output, **options
    )


@pytest.fixture(scope="module")
def exported(prepared_recipe, tmp_path_factory):
    """A folder for each model, made on first use: recipe, weights, our logits and continuation, folder."""
    made = {}

    def get(name):
        if name not in made:
            recipe = with_model(prepared_recipe, {**MODELS, "grouped": GROUPED_GPT2}[name])
            folder = tmp_path_factory.mktemp("huggingface") / name
            weights, logits, continued = run_ranks(random_model, 1, recipe)[0]
            write(recipe, weights, folder)
            made[name] = (recipe, weights, logits, continued, folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", [*MODELS, "grouped"])
def test_transformers_gives_our_logits(exported, name):
    recipe, _, ours, continued, folder = exported(name)
    assert not torch.distributed.is_initialized()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.vocab_size == VOCAB
    with torch.no_grad():
        theirs = model(tokens()).logits
    assert ours.shape == theirs.shape and ours.std() > 0.5
    print("DIFF", name, (ours - theirs).abs().max(), ours.abs().max(), ours.std())
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, ours.abs().max())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == recipe.model.tied
    with torch.no_grad():
        generated = model.generate(tokens()[:1, :6], max_length=32, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, continued)
