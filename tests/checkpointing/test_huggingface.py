"""Hugging Face folders: transformers computes what we compute, and what was written comes back exactly."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from agg import VocabShard
from agg.vocab_shard import padded_vocab_size
from pretrain.checkpointing.huggingface.export import export_huggingface
from pretrain.checkpointing.huggingface.initial_weights import check_initial_weights, load_initial_weights
from pretrain.data.prepared import TOKENIZER_NAME, PreparedData
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


def tokenizer_file(recipe):
    return Path(recipe.data.folder) / TOKENIZER_NAME


def tokens():
    return torch.randint(VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))


def build(recipe, tensor_parallel_size, seed):
    from pretrain.model.gpt import build_model
    from pretrain.topology import connect

    topology = connect(change(recipe, parallel={"tensor_model_parallel_size": tensor_parallel_size}))
    rank, group = topology.tensor_parallel_rank, topology.tensor_parallel_group
    shard = VocabShard.of_rank(VOCAB, rank, tensor_parallel_size, group)
    return build_model(recipe.model, shard, padded_vocab_size(VOCAB, 128), seed).eval(), shard, rank


@torch.no_grad()
def random_model(rank, world_size, recipe):
    """Every parameter, biases and norms too, far from where it starts; all logits; and a greedy continuation."""
    module, _, _ = build(recipe, 1, seed=3)
    torch.manual_seed(4)
    for parameter in module.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    logits = torch.stack([module(tokens()[:, :length]) for length in range(1, 33)], dim=1)  # of each last position
    ids = tokens()[:1, :6]
    while ids.shape[1] < 32:
        ids = torch.cat([ids, module(ids).argmax(1, keepdim=True)], dim=1)
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}, logits, ids


def write(recipe, weights, output, **options):
    return export_huggingface(weights.__getitem__, weights, recipe.model, tokenizer_file(recipe), output, **options)


@pytest.fixture(scope="module")
def exported(prepared_recipe, tmp_path_factory):
    """A folder for each model, made on first use: recipe, weights, our logits and continuation, folder."""
    made = {}

    def get(name):
        if name not in made:
            model = {**MODELS, "gpt2-grouped": GROUPED_GPT2}[name]
            recipe = change(prepared_recipe, model=vars(model))
            folder = tmp_path_factory.mktemp("huggingface") / name
            weights, logits, continued = run_ranks(random_model, 1, recipe)[0]
            write(recipe, weights, folder)
            made[name] = (recipe, weights, logits, continued, folder)
        return made[name]

    return get


@pytest.mark.parametrize("name", [*MODELS, "gpt2-grouped"])
def test_transformers_gives_our_logits_and_generates_our_text(exported, name):
    recipe, _, ours, continued, folder = exported(name)
    assert not torch.distributed.is_initialized()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.vocab_size == VOCAB
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == recipe.model.tied
    with torch.no_grad():
        theirs = model(tokens()).logits
        generated = model.generate(tokens()[:1, :6], max_length=32, do_sample=False, eos_token_id=None)
    assert ours.shape == theirs.shape and ours.std() > 0.5
    assert (ours - theirs).abs().max() <= 1e-5
    assert torch.equal(generated, continued)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@torch.no_grad()
def initialized_model(rank, world_size, recipe):
    module, shard, tensor_parallel_rank = build(recipe, world_size, seed=77)
    before = module.output_embedding[shard.real :].clone()
    load_initial_weights(module, recipe, PreparedData.open(recipe), shard, tensor_parallel_rank)
    assert torch.equal(module.output_embedding[shard.real :], before)
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}, module(tokens())


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact_and_the_same_on_every_degree(exported, name):
    recipe, weights, logits, _, folder = exported(name)
    recipe = change(recipe, model={"init_from": str(folder)})
    back, _ = run_ranks(initialized_model, 1, recipe)[0]
    assert back.keys() == weights.keys()
    for key, weight in weights.items():
        rows = VOCAB if key in ("embedding.word_embeddings.weight", "output_layer.weight") else None
        assert torch.equal(back[key][:rows], weight[:rows]), key
    degrees = [2, 4] if recipe.model.query_groups == 4 else [2]
    for degree in degrees:
        for _, last in run_ranks(initialized_model, degree, recipe):
            assert (last - logits[:, -1]).abs().max() <= 1e-5


def test_streams_into_numbered_files(exported, tmp_path):
    recipe, weights, logits, _, whole = exported("llama")
    alive, most = 0, 0

    def read(name):
        nonlocal alive, most
        tensor = weights[name].clone()
        alive += 1
        most = max(most, alive)

        def gone():
            nonlocal alive
            alive -= 1

        weakref.finalize(tensor, gone)
        return tensor

    limit = 40_000
    done = export_huggingface(
        read, weights, recipe.model, tokenizer_file(recipe), tmp_path / "out", max_file_bytes=limit
    )
    assert most <= 2 and len(weights) > 10  # the one that is written, and the one that is read
    count = len(done.files)
    assert count > 3 and done.files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    parts = [load_file(tmp_path / "out" / name) for name in done.files]
    for part in parts:
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= limit
    expected = load_file(whole / "model.safetensors")
    assert sum(map(len, parts)) == done.tensors == len(expected)
    assert all(torch.equal(tensor, expected[name]) for part in parts for name, tensor in part.items())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.tensor_bytes == sum(t.nbytes for t in expected.values())
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens()).logits
    assert (theirs - logits).abs().max() <= 1e-5
    check_initial_weights(change(recipe, model={"init_from": str(tmp_path / "out")}), PreparedData.open(recipe))


def test_bfloat16(exported, tmp_path):
    recipe, weights, _, _, whole = exported("gpt2")
    write(recipe, weights, tmp_path / "out", dtype=torch.bfloat16)
    expected = load_file(whole / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[name].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    halves, _ = run_ranks(initialized_model, 1, change(recipe, model={"init_from": str(tmp_path / "out")}))[0]
    key = "decoder.layers.1.mlp.linear_fc1.weight"
    assert halves[key].dtype == torch.float32 and torch.equal(halves[key], weights[key].bfloat16().float())


def test_export_refuses(exported, tmp_path):
    recipe, weights, _, _, _ = exported("gpt2")
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        write(recipe, weights, output)
    for name, change_of, message in [
        ("fewer", {"num_layers": 3}, "lacks parameters of the recipe's model: decoder.layers.2."),
        ("more", {"num_layers": 1}, "has not: decoder.layers.1."),
        (
            "other",
            {"ffn_hidden_size": 64},
            "linear_fc1.weight has shape (128, 32), the recipe's model has (64, 32)",
        ),
        ("capped", {"logit_soft_cap": 30.0}, "model.logit_soft_cap is 30.0, and gpt2 models there cap no logits"),
    ]:
        with pytest.raises(UserError) as caught:
            write(change(recipe, model=change_of), weights, tmp_path / name)
        assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (output / "mine.txt").read_text() == "kept"


def test_outputs(exported, tmp_path, monkeypatch):
    """Remains of an export that was killed, also by this process number, are passed by; an empty folder is filled."""
    recipe, weights, _, _, whole = exported("gpt2")
    remains = tmp_path / f"out.{os.getpid()}.tmp"
    remains.mkdir()
    write(recipe, weights, tmp_path / "out")
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    inode = mounted.stat().st_ino  # a mount point can neither be replaced nor removed
    write(recipe, weights, mounted)
    assert mounted.stat().st_ino == inode
    expected = {path.name: path.read_bytes() for path in whole.iterdir()}
    for folder in (tmp_path / "out", mounted):
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mounted", "out", remains.name]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("loop", os.fsdecode(b"\xff")):
        with pytest.raises(UserError, match="--output .* cannot be used"):
            write(recipe, weights, tmp_path / name)


@pytest.mark.parametrize("there", [False, True])
def test_two_exports_to_one_output(exported, tmp_path, there):
    """The second begins when the first has begun: one of them is written, the other is refused."""
    recipe, weights, _, _, whole = exported("gpt2")
    output, refused = tmp_path / "out", []
    if there:
        output.mkdir()

    def read(name):
        if name == "decoder.final_layernorm.bias":
            try:
                write(recipe, weights, output)
            except UserError as error:
                refused.append(str(error))
        return weights[name]

    try:
        export_huggingface(read, weights, recipe.model, tokenizer_file(recipe), output)
    except UserError as error:
        refused.append(str(error))
    assert len(refused) == 1 and f"{output} exists and is not an empty folder" in refused[0]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refusal(recipe, folder, **model):
    recipe = change(recipe, model={"init_from": str(folder), **model})
    with pytest.raises(UserError) as caught:
        check_initial_weights(recipe, PreparedData.open(recipe))
    return str(caught.value)


def test_another_model_is_refused_with_what_differs(exported, tmp_path):
    recipe, _, _, _, folder = exported("llama")
    message = refusal(
        recipe, folder, norm_epsilon=1e-5, rope_base=10_000, num_query_groups=8, tied_embeddings=True, num_layers=1
    )
    for part in (
        "num_hidden_layers is 2 there, model.num_layers is 1",
        "num_key_value_heads is 4 there, model.num_query_groups is 8",
        "tie_word_embeddings is False there, model.tied_embeddings is True",
        "rms_norm_eps is 0.001 there, model.norm_epsilon is 1e-05",
        "rope_theta is 500.0 there, model.rope_base is 10000.0",
        "more",
    ):
        assert part in message
    message = refusal(recipe, folder, ffn_hidden_size=64)
    assert "model.layers.0.mlp.gate_proj.weight has shape (128, 32), the recipe makes it (64, 32)" in message
    assert "model_type is 'llama' there, model.style is 'gpt2'" in refusal(recipe, folder, style="gpt2")
    recipe, _, _, _, folder = exported("gpt2")
    message = refusal(recipe, folder, sequence_length=64)
    assert "transformer.wpe.weight has shape (32, 32), the recipe makes it (64, 32)" in message
    assert "has keys and values for each head" in refusal(recipe, folder, num_query_groups=2)

    foreign = shutil.copytree(folder, tmp_path / "foreign")
    config = json.loads((foreign / "config.json").read_text())
    del config["activation_function"]  # transformers takes gelu_new then
    (foreign / "config.json").write_text(json.dumps(config))
    assert "activation_function is 'gelu_new' there, our gpt2 models have 'gelu'" in refusal(recipe, foreign)


def test_rope_scaling_is_refused_however_it_is_written(exported, tmp_path):
    recipe, _, _, _, folder = exported("llama")
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    del config["rope_parameters"]
    (copy / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    check_initial_weights(change(recipe, model={"init_from": str(copy)}), PreparedData.open(recipe))
    for scaling in ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": {"rope_type": "llama3"}}):
        (copy / "config.json").write_text(json.dumps({**config, **scaling}))
        assert "rope_type is" in refusal(recipe, copy)


def test_damaged_folders_and_other_tokenizers_are_refused(exported, tmp_path):
    recipe, _, _, _, folder = exported("gpt2")
    assert "is not a Hugging Face folder" in refusal(recipe, tmp_path / "nowhere")
    copy = shutil.copytree(folder, tmp_path / "copy")
    with (copy / "tokenizer.model").open("ab") as file:
        file.write(b"\0")
    message = refusal(recipe, copy)
    assert "were prepared with another tokenizer" in message and "data.tokenizer.model_file=" in message
    (copy / "tokenizer.model").unlink()
    assert "has no tokenizer.model" in refusal(recipe, copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["transformer.ln_f.bias"]
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:-1].clone()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    message = refusal(recipe, copy)
    assert "transformer.ln_f.bias is missing, the recipe makes it (32,)" in message
    assert "transformer.wte.weight has shape (499, 32), the recipe makes it (500, 32)" in message
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    assert "cannot be read as safetensors" in refusal(recipe, copy)


def test_weights_that_are_no_numbers_are_refused(exported, tmp_path):
    """Eight bits without their scales, or weights of a run that diverged: it would train on, from nothing."""
    recipe, _, _, _, folder = exported("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    copy = shutil.copytree(folder, tmp_path / "copy")
    whole = load_file(copy / "model.safetensors")
    for dtype, called in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        save_file({**whole, name: whole[name].to(dtype)}, copy / "model.safetensors", metadata={"format": "pt"})
        assert f"{name} is of type {called}, and must be one of F64, F32, F16, BF16" in refusal(recipe, copy)
    for value in (float("nan"), float("-inf")):
        broken = whole[name].clone()
        broken[3, 2] = value
        save_file({**whole, name: broken}, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(AssertionError, match=f"CheckpointError: .*{name} holds values that are not finite"):
            run_ranks(initialized_model, 2, change(recipe, model={"init_from": str(copy)}))
