from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pretrain.data.tokenizer import LONGEST_LINE_BYTES, Tokenizer, sample_lines, train_tokenizer, training_lines
from pretrain.errors import UserError
from pretrain.recipe import TokenizerRecipe
from tests.data.helpers import lines

TEXTS = [
    "the cat sat on the mat.",
    "  two leading, double  inside, two trailing  ",
    "a line\nanother\n\n\n    an indented one\n",
    "tab\there, carriage return\r\n, a NUL \0, unseen letters: 漢字 ñ 🙂",
    "<s> </s> <unk> <pad> <0x41> are text here",
    "",
]


def train(path: Path, texts: list[str] | None = None, seed: int = 3, **recipe: Any) -> Tokenizer:
    recipe = {"vocab_size": 330, **recipe}
    train_tokenizer(training_lines(texts or lines(300)), TokenizerRecipe(**recipe), path, seed)
    return Tokenizer.load(path)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tmp_path: Path, model_type: str, text: str) -> None:
    tokenizer = train(tmp_path / "t.model", model_type=model_type, vocab_size=310)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids)


def test_ids_and_pieces(tmp_path: Path) -> None:
    tokenizer = train(tmp_path / "t.model")
    assert tokenizer.vocab_size == 330
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert tokenizer.special_ids == (0, 1, 2, 3)
    assert tokenizer.piece(2) == "</s>"
    assert tokenizer.encode("\n") == [4] and tokenizer.piece(4) == "\n"


def test_same_lines_same_bytes_even_when_sampled(tmp_path: Path) -> None:
    first = train(tmp_path / "a.model", training_sentences=150)
    assert first.sha256 == train(tmp_path / "b.model", training_sentences=150).sha256
    assert first.sha256 != train(tmp_path / "c.model", training_sentences=150, seed=4).sha256
    assert first.sha256 != train(tmp_path / "d.model").sha256


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_too_large_vocabulary_names_the_largest(tmp_path: Path, model_type: Any) -> None:
    with pytest.raises(UserError, match=r"vocab_size is 9000, more than .* largest size that works is (\d+)") as caught:
        train(tmp_path / "t.model", vocab_size=9000, model_type=model_type)
    assert not list(tmp_path.iterdir())
    largest = int(str(caught.value).rsplit(" ", 1)[1])
    assert train(tmp_path / "t.model", vocab_size=largest, model_type=model_type).vocab_size == largest


def test_too_small_vocabulary_names_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size is 100, less than .* smallest size is \d+"):
        train(tmp_path / "t.model", vocab_size=100)


def test_a_vocabulary_beyond_any_integer_of_sentencepiece(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocab_size is 4000000000\)"):
        train(tmp_path / "t.model", vocab_size=4_000_000_000)


def test_sample_is_fair_and_keeps_what_fits() -> None:
    texts = list(map(str, range(20)))
    assert sample_lines(texts, 20, seed=0) == texts
    drawn = Counter(line for seed in range(2000) for line in sample_lines(texts, 5, seed))
    assert sum(drawn.values()) == 10_000 and set(drawn) == set(texts)
    assert all(410 < count < 590 for count in drawn.values())  # 500 expected, standard deviation 19


def test_training_lines_are_short_and_lose_nothing() -> None:
    long = "é" * 3 * LONGEST_LINE_BYTES
    parts = list(training_lines([f"a\n\n  \nb\0c\n{long}"]))
    assert parts[:3] == ["a", "b", "c"]
    assert "".join(parts[3:]) == long
    assert max(len(part.encode()) for part in parts) <= LONGEST_LINE_BYTES


def test_load_refuses_what_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "x.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.model is an empty file"):
        Tokenizer.load(tmp_path / "empty.model")
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(tmp_path / "missing.model")
