"""``AutoTokenizer`` gives the ids of our SentencePiece tokenizers; where it cannot, that is said."""

from __future__ import annotations

import ast
import io
import json
import random
import sys
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from pretrain.checkpointing.huggingface.tokenizer import write_tokenizer
from pretrain.data.tokenizer import Tokenizer, train_tokenizer, training_lines
from pretrain.errors import UserError
from pretrain.recipe import TokenizerRecipe

CODE = Path(random.__file__).read_text(encoding="utf-8")
CORPUS = [CODE, "<unk> </s> <pad> <0x41>\n" * 300]
PARTS = (
    " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\0", "the", "self.", "def ", "Random", "e", "aa", "ab", "0", "12",
    "3.14", "_", "---", "====", "#", "é", "e\u0301", "ü", "漢字", "日本語", "😀", "👩\u200d👧", "\u00a0", "\u200b",
    "\ufb01", "\u2581", "</s>", "<s>", "<unk>", "<pad>", "<0x41>", "<0x", "Ω", "\ufeff",
)  # fmt: skip


def texts():
    """1,500: mixtures of difficult parts, pieces of code, any characters, and long runs."""
    draw = random.Random(1)
    for _ in range(500):
        yield "".join(draw.choice(PARTS) for _ in range(draw.randint(0, 25)))
    for _ in range(400):
        start = draw.randrange(len(CODE))
        yield CODE[start : start + draw.randint(1, 400)]
    for _ in range(200):
        yield "".join(chr(draw.choice((draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000)))) for _ in range(9))
    for sign in (" ", "a", "-", "=", "_", "\n", "ab", " -"):
        for length in range(1, 51):
            yield sign * length


def loaded(model_file, folder, model_type="gpt2"):
    """Ours, theirs and what the export says of them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    difference = write_tokenizer(model_file, folder)
    return Tokenizer.load(model_file), AutoTokenizer.from_pretrained(folder), difference


def trained(path, **options):
    recipe = TokenizerRecipe(vocab_size=700, **options)
    train_tokenizer(training_lines(CORPUS), recipe, path, 0)
    return path


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_same_ids_and_texts_for_bpe(tmp_path, model_type, byte_fallback):
    model_file = trained(tmp_path / "tokenizer.model", byte_fallback=byte_fallback)
    ours, theirs, difference = loaded(model_file, tmp_path / "out", model_type)
    assert difference == "" and len(theirs) == ours.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (ours.eos_id, ours.pad_id, ours.unk_id)
    assert theirs.bos_token_id == ours.eos_id  # what stands before a document in training
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model_file.read_bytes()
    unknown = 0
    for text in texts():
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids, text
        if ours.unk_id in ids:  # SentencePiece writes it as U+2047
            unknown += 1
            ids = [token_id for token_id in ids if token_id != ours.unk_id]
        assert theirs.decode(ids, skip_special_tokens=True) == theirs.decode(ids) == ours.decode(ids), text
    assert (unknown > 100) != byte_fallback


def test_unigram_differs_only_between_cuts_of_one_score(tmp_path):
    model_file = trained(tmp_path / "tokenizer.model", model_type="unigram")
    ours, theirs, difference = loaded(model_file, tmp_path / "out")
    score = sentencepiece.SentencePieceProcessor(model_file=str(model_file)).get_score
    different = 0
    for text in texts():
        ids, other = ours.encode(text), theirs(text).input_ids
        assert ours.decode(other) == theirs.decode(other) == ours.decode(ids)
        if ids != other:
            different += 1
            assert sum(map(score, ids)) == pytest.approx(sum(map(score, other)), rel=1e-5)
    assert 0 < different < 200 and "in tokenizer.json" in difference


def given(path, **options):
    """A model that was not trained here: with SentencePiece's own defaults where nothing is said."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_lines(CORPUS), model_writer=model, vocab_size=700, minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())
    return path


AS_IS = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
FAMILIES = {
    "llama": AS_IS,  # a blank before the text, and no piece for newlines
    "gemma": {**AS_IS, "add_dummy_prefix": False, "user_defined_symbols": ["\n", "<x>", "aab"]},
}


@pytest.mark.parametrize("options", FAMILIES.values(), ids=FAMILIES)
def test_given_models_that_do_not_normalize(tmp_path, options):
    model_file = given(tmp_path / "tokenizer.model", model_type="bpe", **options)
    ours, theirs, difference = loaded(model_file, tmp_path / "out", "llama")
    assert difference == "" and theirs.pad_token is None
    for text in texts():
        ids = ours.encode(text)
        assert theirs(text).input_ids == ids and theirs.decode(ids) == ours.decode(ids), text


def test_a_model_that_normalizes_is_said_to_differ(tmp_path):
    """tokenizers normalizes combined characters differently; plain text gets the same ids."""
    ours, theirs, difference = loaded(given(tmp_path / "tokenizer.model", model_type="bpe"), tmp_path / "out")
    assert "in tokenizer.model and" in difference
    text = ast.literal_eval(difference.partition(" is [")[0])
    assert theirs(text).input_ids != ours.encode(text)
    plain = "  The  quick\tbrown fox,  \uff21 \ufb01ne café \u00a0 jumps. "
    assert theirs(plain).input_ids == ours.encode(plain)


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="only SentencePiece models of type bpe and unigram"):
        loaded(given(tmp_path / "char.model", model_type="char", hard_vocab_limit=False), tmp_path / "char")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[huggingface\]'"):
        loaded(trained(tmp_path / "tokenizer.model"), tmp_path / "out")
