"""Do the embeddings know which words are alike? Spearman correlation of their cosines with human scores.

A file has one pair a line, "word TAB word TAB score", as MEN, WordSim-353 and others can be written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from agg import VocabShard
from pretrain.errors import UserError
from pretrain.evaluation.geometry import lookup_rows
from pretrain.evaluation.subject import Codec
from pretrain.files import file_sha256

Encode = Callable[[str], list[int]]
DRAWS, SEED = 1_000, 0  # of the bootstrap
DRAWS_AT_ONCE = 50  # every rank ranks them, in several copies
FEWEST_PAIRS = 10  # that an interval is given for: draws of fewer are hardly different
CONFIDENCE = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class WordPair:
    first: str
    second: str
    score: float  # by people, on the scale of the file; only its order counts


class Similarity(TypedDict):
    """What one file gives.

    spearman: in [-1, 1], None where it is undefined because all cosines are equal.
    interval: 95 % of what other pairs of the same kind would give, see :func:`bootstrap_interval`; None without
        spearman.
    coverage: share of the pairs of which every sub-token occurs in the training data, None without counts.
    whole_words: share of the words that are one token.
    sha256: of the file.
    """

    spearman: float | None
    interval: list[float] | None
    pairs: int
    coverage: float | None
    whole_words: float
    sha256: str


def words_in_text(codec: Codec) -> Encode:
    """A word to its ids inside a sentence, where most tokenizers put the blank before it into its first token.

    A blank that is a token of its own is not the word's. No ids for a word of which a part is unknown.
    """
    before, with_blank = codec.encode("a"), codec.encode("a ")
    blank = with_blank[len(before) :] if with_blank[: len(before)] == before else []

    def encode(word: str) -> list[int]:
        ids = codec.encode(f"a {word}")
        found = ids[len(before) :] if ids[: len(before)] == before else codec.encode(word)
        if blank and found[: len(blank)] == blank:
            found = found[len(blank) :]
        return [] if codec.unk_id in found else found

    return encode


def read_word_pairs(path: Path) -> list[WordPair]:
    """The pairs of a file; empty lines are skipped.

    Raises:
        UserError: no such file, not UTF-8, a line that is not a pair (named by file and line), fewer than two pairs, or
            the same score for all.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the word pairs of {path}: {error.strerror}: name files that are there in "
            "reporting.word_similarity"
        ) from error
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line} is not UTF-8: {error.reason}: convert the file to UTF-8") from error
    pairs = [_read_pair(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if len(pairs) < 2:
        raise UserError(f"{path} holds {len(pairs)} word pairs, a correlation needs two: take another file")
    if len({pair.score for pair in pairs}) == 1:
        raise UserError(f"{path}: all scores are {pairs[0].score}, a correlation needs different ones")
    return pairs


def read_encoded(path: Path, encode: Encode) -> tuple[list[WordPair], dict[str, list[int]]]:
    """The pairs of a file, and the ids of each word.

    Raises:
        UserError: as :func:`read_word_pairs`, or a word without any token or with an unknown one.
    """
    pairs = read_word_pairs(path)
    tokens = {word: encode(word) for pair in pairs for word in (pair.first, pair.second)}
    without = [word for word, ids in tokens.items() if not ids]
    if without:
        raise UserError(
            f"{path}: the tokenizer gives no token, or the unknown one, for {', '.join(map(repr, without[:5]))}"
            f"{' ...' if len(without) > 5 else ''}: take the pairs with such words out"
        )
    return pairs, tokens


def bootstrap_interval(first: Sequence[float], second: Sequence[float]) -> list[float] | None:
    """Percentile interval of Spearman's correlation of two columns: rows are drawn with replacement, as many as there
    are, 1,000 times, always the same ones (Efron 1979). Draws in which one column is constant have none, and do not
    count; None if no draw has, and below :data:`FEWEST_PAIRS`.
    """
    from scipy.stats import rankdata

    if len(first) < FEWEST_PAIRS:
        return None
    columns = np.array([first, second])
    places = np.random.default_rng(SEED).integers(len(first), size=(DRAWS, len(first)))
    correlations = []
    for some in np.array_split(places, DRAWS // DRAWS_AT_ONCE):
        with np.errstate(invalid="ignore"):
            ranks = rankdata(columns[:, some], axis=-1)  # [2, draws, n]
            ranks -= ranks.mean(-1, keepdims=True)
            ranks /= np.linalg.norm(ranks, axis=-1, keepdims=True)
        correlations.append((ranks[0] * ranks[1]).sum(-1).clip(-1, 1))
    found = np.concatenate(correlations)
    found = found[np.isfinite(found)]
    return np.percentile(found, CONFIDENCE).tolist() if len(found) else None


def word_similarity(
    files: Sequence[Path],
    encode: Encode,
    weight: torch.Tensor,
    shard: VocabShard,
    token_counts: torch.Tensor | None = None,
) -> dict[str, Similarity]:
    """One result for each file, named by its stem. Every rank gets the same.

    The vector of a word is the mean of the rows of its sub-tokens.

    Args:
        encode: text to ids, without special tokens.
        weight: [V_local, D] rows of ``shard``.
        token_counts: int64 [V], occurrences in the training data.

    Raises:
        UserError: as :func:`read_word_pairs`, two files of one name, or a word without any token.
    """
    names = [path.stem for path in files]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"two files of word pairs have the same name: {', '.join(repeated)}")
    return {path.stem: _one_file(path, encode, weight, shard, token_counts) for path in files}


def _read_pair(line: str, where: str) -> WordPair:
    parts = [part.strip() for part in line.split("\t")]
    if len(parts) != 3 or not parts[0] or not parts[1]:
        raise UserError(f"{where}: {line.strip()!r} is not word TAB word TAB score")
    try:
        score = float(parts[2])
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"{where}: the score {parts[2]!r} is not a number")
    return WordPair(parts[0], parts[1], score)


def _one_file(
    path: Path, encode: Encode, weight: torch.Tensor, shard: VocabShard, token_counts: torch.Tensor | None
) -> Similarity:
    from scipy.stats import spearmanr  # now: a second that a run without such a file is spared

    pairs, tokens = read_encoded(path, encode)
    vectors = _word_vectors(tokens, weight, shard)
    first = torch.stack([vectors[pair.first] for pair in pairs])
    second = torch.stack([vectors[pair.second] for pair in pairs])
    cosines = torch.nn.functional.cosine_similarity(first, second, dim=1).tolist()
    scores = [pair.score for pair in pairs]
    defined = len(set(cosines)) > 1
    coverage = None
    if token_counts is not None:
        seen = {word: bool((token_counts[torch.tensor(ids)] > 0).all()) for word, ids in tokens.items()}
        coverage = sum(seen[pair.first] and seen[pair.second] for pair in pairs) / len(pairs)
    return Similarity(
        spearman=float(spearmanr(cosines, scores).statistic) if defined else None,
        interval=bootstrap_interval(cosines, scores) if defined else None,
        pairs=len(pairs),
        coverage=coverage,
        whole_words=sum(len(ids) == 1 for ids in tokens.values()) / len(tokens),
        sha256=file_sha256(path),
    )


def _word_vectors(tokens: dict[str, list[int]], weight: torch.Tensor, shard: VocabShard) -> dict[str, torch.Tensor]:
    """fp64 [D] on the CPU for each word; only the rows that occur are fetched from the ranks."""
    ids = sorted({token for word_ids in tokens.values() for token in word_ids})
    rows = lookup_rows(weight, shard, torch.tensor(ids)).cpu()
    place = {token: i for i, token in enumerate(ids)}
    return {word: rows[[place[token] for token in word_ids]].mean(0) for word, word_ids in tokens.items()}
