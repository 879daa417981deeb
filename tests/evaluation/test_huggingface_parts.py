"""A published tokenizer and a published model, each alone: odd ones, and those that are refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, XLMConfig, XLMWithLMHeadModel

from pretrain.errors import UserError
from pretrain.evaluation.huggingface import HuggingFaceModel, HuggingFaceTokens, _stream
from pretrain.recipe import CorpusRecipe, DataRecipe, Recipe

WORDS = [f"w{i}" for i in range(500)]


@pytest.fixture
def tokens(tmp_path: Path) -> HuggingFaceTokens:
    """A word is a token; no id is odd."""
    vocab = {"a": 0, "</s>": 2} | {word: 2 * i + 4 for i, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    return HuggingFaceTokens(tmp_path)


def recipe_of(tmp_path: Path, lines: int) -> Recipe:
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(f"{split} {' '.join(WORDS[-100:])}\n" * lines)
    corpus = CorpusRecipe(
        source="text", train=(f"{tmp_path}/train.txt",), test=(f"{tmp_path}/test.txt",), document_per="line"
    )
    return Recipe(name="x", data=DataRecipe(folder=str(tmp_path / "data"), corpus=corpus))


def test_ids_may_have_gaps(tokens: HuggingFaceTokens, tmp_path: Path) -> None:
    assert tokens.vocab_size == 2 * 500 + 3  # 502 tokens
    ids, _ = next(tokens.documents(recipe_of(tmp_path, 1), "train"))
    assert len(np.bincount(ids, minlength=tokens.vocab_size)) == tokens.vocab_size


def test_a_split_is_held_as_numbers_not_as_objects(tokens: HuggingFaceTokens, tmp_path: Path) -> None:
    """A list of 100 million ids would take 5 GB."""
    recipe = recipe_of(tmp_path, 1_000)
    tracemalloc.start()
    stream, text_bytes = _stream(tokens, recipe)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stream.total == 1_000 * 102 and text_bytes == (tmp_path / "test.txt").stat().st_size - 1_000
    assert stream.read(100, 4).tolist() == [1002, 2, 0, 804]
    assert peak < 30 * stream.total


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=500, tie_word_embeddings=False, eos_token_id=0)
    )


@pytest.mark.parametrize("place", ["lm_head.weight", "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, place: str) -> None:
    model = tiny_gpt2()
    model.get_parameter(place).data[-1, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} has a model whose embeddings or logits are not finite"):
        HuggingFaceModel(tmp_path, 500, torch.float32, torch.device("cpu"))
    if place != "transformer.h.0.mlp.c_fc.weight":  # of a row that only pads
        HuggingFaceModel(tmp_path, 499, torch.float32, torch.device("cpu"))


def test_a_masked_model_that_looks_for_its_padding_is_refused(tmp_path: Path) -> None:
    """XLM takes the number of ids that are not padding, its id 2, for the length of the text."""
    torch.manual_seed(0)
    sizes = dict(emb_dim=16, n_layers=2, n_heads=2, n_words=500, init_std=0.3, embed_init_std=0.3)
    for causal in (True, False):
        XLMWithLMHeadModel(XLMConfig(causal=causal, **sizes)).save_pretrained(tmp_path)
        if causal:
            HuggingFaceModel(tmp_path, 500, torch.float32, torch.device("cpu"))
        else:
            with pytest.raises(UserError, match="sees the tokens to come"):
                HuggingFaceModel(tmp_path, 500, torch.float32, torch.device("cpu"))
