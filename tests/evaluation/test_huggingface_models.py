"""Published models by the measures of runs: an exported run is measured as the run itself; what is none is refused."""

from __future__ import annotations

import itertools
import json
import shutil
import sys

import pytest
import torch
import yaml
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from pretrain.__main__ import main
from pretrain.evaluation.huggingface import HuggingFaceModel
from pretrain.recipe_io import recipe_to_dict
from pretrain.run_folder import RunFolder
from tests.distributed import run_ranks
from tests.evaluation.test_measures_of_runs import assert_alike
from tests.small_runs import change, train_on_ranks

WORDS = ("the", "over", "a", "ab", "under", "be", "zu", "model")
NOT_OF_THE_TEXT = (  # what differs because one is a run, and rows that only pad are not exported
    "run", "method", "seed", "checkpoint_step", "tokens", "training", "parameters",
)  # fmt: skip


def evaluated(rank, world_size, recipe):
    from pretrain.evaluation.evaluate import evaluate_run
    from pretrain.topology import connect

    folder = RunFolder(recipe.run_folder)
    evaluate_run(folder, recipe, connect(recipe), folder.checkpoints / "step_00000006")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def exported(request, prepared_recipe, tmp_path_factory):
    """A run, its evaluation, its export and a file of its recipe; GPT-2 is tied, Llama is not."""
    root = tmp_path_factory.mktemp(request.param)
    (root / "pairs.tsv").write_text(
        "".join(f"{a}\t{b}\t{i}\n" for i, (a, b) in enumerate(itertools.combinations(WORDS, 2)))
    )
    recipe = change(
        prepared_recipe,
        output_root=str(root),
        model={"style": request.param},
        optimizer={"learning_rate": 3e-2},
        reporting={"word_similarity": (str(root / "pairs.tsv"),)},
    )
    train_on_ranks(recipe, 1)
    run_ranks(evaluated, 1, recipe)
    assert main(["checkpoint", "export", str(recipe.run_folder), "--output", str(root / "out")]) == 0
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe_to_dict(recipe)))
    return recipe, root


def refused(capfd, *arguments) -> str:
    capfd.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == 2
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err and err.count("error: ") == 1
    return err[err.index("error: ") :]


def test_an_export_is_measured_as_its_run(exported):
    recipe, root = exported
    found_in = root / "measured"
    assert main(["evaluate", str(root / "out"), "--data", str(root / "recipe.yaml"), "--output", str(found_in)]) == 0
    found, expected = (json.loads((folder / "evaluation.json").read_text()) for folder in (found_in, recipe.run_folder))
    assert found.keys() == expected.keys()
    assert (found["run"], found["method"], found["seed"], found["checkpoint_step"]) == ("out", None, None, None)
    for key in NOT_OF_THE_TEXT:
        del found[key], expected[key]
    for tree in (found, expected):  # <unk>, and bytes that are no characters, are written differently
        for example in tree["generation"]["examples"]:
            del example["greedy"], example["sampled"]
        for part in (tree, tree["input_embedding"] or tree):
            for entry in part["under_trained_tokens"]["tokens"]:
                entry["text"] = entry["id"]
    assert_alike(found, expected, "")
    assert (expected["input_embedding"] is None) == recipe.model.tied
    assert expected["word_similarity"]["pairs"]["interval"] is not None
    assert (found_in / "evaluation.npz").exists()


def test_another_batch_and_window(exported, tmp_path):
    """The recipe's keys can be said on the command line."""
    _, root = exported
    arguments = ["evaluate", str(root / "out"), "--data", str(root / "recipe.yaml"), "--output", str(tmp_path)]
    assert main([*arguments, "model.sequence_length=16", "batch.micro_batch_size=4"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert (found["sliding_window"]["window"], found["sliding_window"]["stride"]) == (16, 4)


def test_what_is_missing_is_said(exported, tmp_path, capfd, monkeypatch):
    recipe, root = exported
    data, output = ("--data", root / "recipe.yaml"), ("--output", tmp_path / "new")
    assert "--data RECIPE" in refused(capfd, root / "out")
    assert "--output FOLDER" in refused(capfd, root / "out", *data)
    assert "leave --checkpoint out" in refused(capfd, root / "out", *data, *output, "--checkpoint", 6)
    assert "is a run" in refused(capfd, root / "out", *data, "--output", recipe.run_folder)
    assert "a run is measured on its own data" in refused(capfd, recipe.run_folder, *data)
    assert "unknown key batch.size" in refused(capfd, root / "out", *data, *output, "batch.size=3")
    message = refused(capfd, root / "out", *data, *output, "model.sequence_length=64")
    assert "sees 32 tokens at most: give model.sequence_length=32 or less" in message
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install -e '.[huggingface]'" in refused(capfd, root / "out", *data, *output)


def test_folders_that_are_no_causal_language_models(exported, tmp_path, capfd):
    _, root = exported
    arguments = ("--data", root / "recipe.yaml", "--output", tmp_path / "new")
    assert "is not a run: it has no recipe.yaml" in refused(capfd, tmp_path / "nothing")

    no_tokenizer = tmp_path / "no_tokenizer"
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=500)).save_pretrained(no_tokenizer)
    assert f"{no_tokenizer} has no tokenizer" in refused(capfd, no_tokenizer, *arguments)

    no_weights = shutil.copytree(root / "out", tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    assert "no causal language model that transformers can load" in refused(capfd, no_weights, *arguments)

    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    others = {
        "sees the tokens to come": BertForMaskedLM(BertConfig(vocab_size=500, **small)),
        "no causal language model that transformers can load": T5ForConditionalGeneration(
            T5Config(vocab_size=500, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "they do not belong together": GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=499)),
    }
    for part, model in others.items():
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(root / "out").save_pretrained(folder)
        assert part in refused(capfd, folder, *arguments)

    headless = shutil.copytree(root / "out", tmp_path / "headless")
    config = json.loads((headless / "config.json").read_text())
    for key in ("n_layer", "num_hidden_layers"):
        if key in config:
            config[key] += 1
    (headless / "config.json").write_text(json.dumps(config))
    assert "lacks weights of its model, which would be random" in refused(capfd, headless, *arguments)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_logits_are_computed_in_float32(tmp_path, kind):
    """In bfloat16 they tie; a tied model stays tied, and what follows the output embedding still applies."""
    torch.manual_seed(1)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=500, initializer_range=0.5))
    else:
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        model = Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=500, intermediate_size=16, initializer_range=0.5, final_logit_softcapping=3.0, **sizes
            )
        )
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    whole, found = (
        HuggingFaceModel(tmp_path, 500, dtype, torch.device("cpu")) for dtype in (torch.float32, torch.bfloat16)
    )
    tokens = torch.randint(500, (16, 32))
    with torch.no_grad():
        rounded = plain(tokens).logits
        hidden, weight = plain.base_model(tokens).last_hidden_state, plain.get_output_embeddings().weight
        expected = hidden.float() @ weight.float().T
        expected = 3 * torch.tanh(expected / 3) if kind == "gemma2" else expected
        losses, predictions = found.token_losses(tokens, tokens)
        assert torch.allclose(found.next_logits(tokens), expected[:, -1], rtol=1e-5, atol=1e-6)
    assert rounded.dtype == torch.bfloat16 and (rounded.argmax(2) != expected.argmax(2)).float().mean() > 0.01
    assert torch.equal(predictions, expected.argmax(2).flatten())
    assert torch.allclose(
        losses, torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens.flatten(), reduction="none")
    )
    assert found.parameters() == whole.parameters() and found.input_embedding() is None
