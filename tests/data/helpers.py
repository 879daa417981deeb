"""Small corpora and recipes for the tests of this folder."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

from pretrain.recipe import BatchRecipe, CorpusRecipe, DataRecipe, ModelRecipe, Recipe, TokenizerRecipe

_TEXT = "the a cat dog sat ran on under mat tree and then rare frequent gate token model loss über naïve"
_WORDS = _TEXT.split()


def lines(count: int, seed: int = 0) -> list[str]:
    """Documents of 3 to 24 words; some repeat."""
    choice = random.Random(seed)
    return [" ".join(choice.choices(_WORDS, k=choice.randint(3, 24))) for _ in range(count)]


def write_lines(path: Path, count: int = 400, seed: int = 0) -> Path:
    path.write_text("\n".join(lines(count, seed)) + "\n", encoding="utf-8")
    return path


def text_recipe(tmp_path: Path, **data_changes: Any) -> Recipe:
    """A recipe over ``tmp_path/corpus.txt`` (written if need be) that prepares into ``tmp_path/data``."""
    corpus_path = tmp_path / "corpus.txt"
    if not corpus_path.exists():
        write_lines(corpus_path)
    data = DataRecipe(
        folder=str(tmp_path / "data"),
        corpus=CorpusRecipe(source="text", train=(str(corpus_path),), valid_fraction=0.1, test_fraction=0.1),
        tokenizer=TokenizerRecipe(vocab_size=320),
        prepare_processes=1,
    )
    return Recipe(
        name="test",
        data=dataclasses.replace(data, **data_changes),
        model=ModelRecipe(sequence_length=16),
        batch=BatchRecipe(micro_batch_size=2, global_batch_size=8, train_steps=40),
    )


def corpus_recipe(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with keys of its corpus section changed."""
    corpus = dataclasses.replace(recipe.data.corpus, **changes)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, corpus=corpus))


def tokenizer_recipe(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with keys of its tokenizer section changed."""
    tokenizer = dataclasses.replace(recipe.data.tokenizer, **changes)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=tokenizer))
