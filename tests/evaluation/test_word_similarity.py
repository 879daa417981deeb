"""Correlation of embedding cosines with human scores."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.stats import spearmanr

from agg import VocabShard
from pretrain.errors import UserError
from pretrain.evaluation.word_similarity import (
    DRAWS,
    FEWEST_PAIRS,
    SEED,
    Similarity,
    WordPair,
    bootstrap_interval,
    read_word_pairs,
    word_similarity,
    words_in_text,
)
from pretrain.files import file_sha256
from tests.distributed import run_ranks

VOCAB, WIDTH = 507, 16
WORDS = ["sun", "moon", "river", "automobile", "car", "ox"]


def encode(word: str) -> list[int]:
    """Two letters a token, spread over all shards."""
    return [sum(map(ord, word[i : i + 2])) * 37 % VOCAB for i in range(0, len(word), 2)]


def embedding() -> torch.Tensor:
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(4))


def write_pairs(folder: Path, name: str = "MEN.tsv") -> Path:
    pairs = [(a, b) for i, a in enumerate(WORDS) for b in WORDS[i + 1 :]]
    path = folder / name
    path.write_text("".join(f"{a}\t{b}\t{i * 7 % 11}.5\n" for i, (a, b) in enumerate(pairs)) + "\n", encoding="utf-8")
    return path


def measure(rank: int, world_size: int, path: Path) -> dict[str, Similarity]:
    shard = VocabShard.of_rank(VOCAB, rank, world_size, dist.group.WORLD if world_size > 1 else None)
    weight = torch.full((len(shard), WIDTH), torch.nan)
    weight[: shard.real] = embedding()[shard.start : shard.start + shard.real]
    counts = torch.ones(VOCAB, dtype=torch.int64)
    counts[encode("river")[0]] = 0
    return word_similarity([path], encode, weight, shard, counts)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_the_definition_on_every_layout(world_size: int, tmp_path: Path) -> None:
    path = write_pairs(tmp_path)
    vectors = {word: embedding().double()[encode(word)].mean(0) for word in WORDS}
    cosines, scores = [], []
    for pair in read_word_pairs(path):
        a, b = vectors[pair.first], vectors[pair.second]
        cosines.append(float(a @ b / (a.norm() * b.norm())))
        scores.append(pair.score)
    expected = {
        "spearman": pytest.approx(spearmanr(cosines, scores).statistic),
        "interval": pytest.approx(bootstrap_interval(cosines, scores)),
        "pairs": 15,
        "coverage": 10 / 15,
        "whole_words": 1 / 6,
        "sha256": file_sha256(path),
    }
    assert abs(spearmanr(cosines, scores).statistic) > 0.02
    assert run_ranks(measure, world_size, path) == [{"MEN": expected}] * world_size


def test_words_that_people_find_alike_and_vectors_that_are(tmp_path: Path) -> None:
    path = tmp_path / "three.tsv"
    path.write_text("a\tb\t9\na\tc\t5\na\td\t1\n", encoding="utf-8")
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 1.0], [-1.0, 0.3]])
    found = word_similarity([path], lambda word: ["abcd".index(word)], weight, VocabShard(0, 4, 4))
    assert found["three"]["spearman"] == pytest.approx(1.0)
    assert (found["three"]["interval"], found["three"]["coverage"], found["three"]["whole_words"]) == (None, None, 1.0)


class Pieces:
    """Blanks join the letter after them, unless ``apart``; U+2581 for a blank, and "?" is unknown."""

    def __init__(self, *, apart: bool = False, dummy: bool = False) -> None:
        self.unk_id, self._apart, self._dummy = 0, apart, dummy

    def encode(self, text: str) -> list[int]:
        text = (" " + text if self._dummy else text).replace(" ", "\u2581")
        pieces = re.findall("\u2581|." if self._apart else "\u2581?.|\u2581", text)
        return [0 if "?" in piece else sum(ord(c) << 16 * i for i, c in enumerate(piece)) for piece in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError

    def piece(self, token_id: int) -> str:
        raise NotImplementedError


def test_words_are_encoded_as_in_a_sentence() -> None:
    for codec in (Pieces(), Pieces(dummy=True)):
        assert words_in_text(codec)("ox") == Pieces().encode(" ox") != Pieces().encode("ox")
    assert words_in_text(Pieces(apart=True))("ox") == Pieces().encode("ox")  # the blank alone is no part of the word
    assert words_in_text(Pieces())("o?x") == []


def test_without_differences_there_is_no_correlation(tmp_path: Path) -> None:
    path = write_pairs(tmp_path)
    found = word_similarity([path], encode, torch.ones(VOCAB, 4), VocabShard(0, VOCAB, VOCAB))
    assert found["MEN"]["spearman"] is None and found["MEN"]["interval"] is None


def test_the_interval_is_of_resampled_pairs() -> None:
    """One draw after the other, with ties from repeated pairs, and the correlation as SciPy has it."""
    generator = np.random.default_rng(5)
    first = generator.normal(size=40)
    second = np.round(first + generator.normal(size=40), 1)
    draws = np.random.default_rng(SEED).integers(40, size=(DRAWS, 40))
    found = [spearmanr(first[draw], second[draw]).statistic for draw in draws]
    low, high = bootstrap_interval(first.tolist(), second.tolist())
    assert [low, high] == pytest.approx(np.percentile(found, [2.5, 97.5]).tolist(), rel=1e-9)
    assert low < spearmanr(first, second).statistic < high and high - low > 0.1
    assert bootstrap_interval(first.tolist(), second.tolist()) == [low, high]


def test_the_interval_of_many_pairs_takes_little_memory() -> None:
    """All draws at once would take 110 bytes a pair and draw, in every rank."""
    generator = np.random.default_rng(5)
    first, second = generator.normal(size=(2, 2_000)).tolist()
    tracemalloc.start()
    assert bootstrap_interval(first, second) is not None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * DRAWS * len(first)


def test_an_interval_of_few_pairs() -> None:
    """Draws of few pairs are the same pairs over and over, and would look certain."""
    some = [float(i) for i in range(FEWEST_PAIRS)]
    assert bootstrap_interval(some, some) == pytest.approx([1.0, 1.0])
    assert bootstrap_interval(some[1:], some[1:]) is None
    assert bootstrap_interval([0.1] * FEWEST_PAIRS, some) is None


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes("\ufefffenêtre\tporte \t 3.5\r\n\r\na\tb\t1\n".encode())
    assert read_word_pairs(path) == [WordPair("fenêtre", "porte", 3.5), WordPair("a", "b", 1.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\t1\na b 2\n", r"x\.tsv:2: 'a b 2' is not word TAB word TAB score"),
        ("a\t\t1\n", r"x\.tsv:1: .* is not word TAB word TAB score"),
        ("a\tb\t1\tc\n", r"x\.tsv:1: "),
        ("a\tb\thigh\n", r"x\.tsv:1: the score 'high' is not a number"),
        ("a\tb\tnan\n", r"x\.tsv:1: the score 'nan' is not a number"),
        ("a\tb\t1\n", r"x\.tsv holds 1 word pairs, a correlation needs two"),
        ("a\tb\t1\nc\td\t1\n", r"x\.tsv: all scores are 1\.0, a correlation needs different ones"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_word_pairs(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"word pairs of .*MEN\.tsv: No such file.*reporting\.word_similarity"):
        read_word_pairs(tmp_path / "MEN.tsv")
    (tmp_path / "latin.tsv").write_bytes(b"sun\tmoon\t2\nfen\xeatre\tporte\t3\n")
    with pytest.raises(UserError, match=r"latin\.tsv:2 is not UTF-8"):
        read_word_pairs(tmp_path / "latin.tsv")


def test_what_would_be_ambiguous_is_refused(tmp_path: Path) -> None:
    weight, shard = torch.ones(VOCAB, 4), VocabShard(0, VOCAB, VOCAB)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UserError, match="the same name: MEN"):
        word_similarity([write_pairs(tmp_path), write_pairs(other)], encode, weight, shard)
    with pytest.raises(UserError, match=r"MEN\.tsv: the tokenizer gives no token, or the unknown one, for 'sun'"):
        word_similarity([write_pairs(tmp_path)], lambda word: [], weight, shard)
