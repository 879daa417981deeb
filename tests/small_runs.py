"""Small real runs for tests: a recipe that trains in a second, and training it on forked ranks."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch

from pretrain.recipe import (
    BatchRecipe,
    CorpusRecipe,
    DataRecipe,
    ModelRecipe,
    ObjectiveRecipe,
    OptimizerRecipe,
    Recipe,
    ReportingRecipe,
    TokenizerRecipe,
)
from pretrain.run_folder import RunFolder
from tests.distributed import run_ranks


def write_corpus(path: Path) -> None:
    """600 lines of made-up words with a Zipf tail, in which the next word depends on the last."""
    draw = random.Random(7)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choice(letters) for _ in range(draw.randint(2, 8))) for _ in range(800)]
    lines = []
    for _ in range(600):
        place, line = draw.randrange(800), []
        for _ in range(draw.randint(10, 40)):
            place = int(800 * draw.random() ** 3) if draw.random() < 0.5 else (place * 7 + 3) % 800
            line.append(words[place])
        lines.append(" ".join(line))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def small_recipe(corpus_file: Path, data_folder: Path) -> Recipe:
    return Recipe(
        name="small",
        data=DataRecipe(
            folder=str(data_folder),
            corpus=CorpusRecipe(source="text", train=(str(corpus_file),)),
            tokenizer=TokenizerRecipe(vocab_size=500),
            prepare_processes=1,
        ),
        model=ModelRecipe(num_layers=2, hidden_size=32, num_attention_heads=4, sequence_length=32),
        objective=ObjectiveRecipe(alpha=20.0, window_steps=4),
        batch=BatchRecipe(micro_batch_size=2, global_batch_size=8, train_steps=6),
        optimizer=OptimizerRecipe(learning_rate=3e-3),
        reporting=ReportingRecipe(
            log_every_steps=1, geometry_every_steps=3, validate_every_steps=3, validation_sequences=8, tensorboard=False
        ),
    )


def change(recipe: Recipe, **sections: Any) -> Recipe:
    """A copy with fields replaced: ``change(r, name="x", batch={"train_steps": 4})``."""
    replaced = {
        name: dataclasses.replace(getattr(recipe, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(recipe, **replaced)


def train_on_ranks(recipe: Recipe, world_size: int, stop_at_step: int | None = None) -> list[dict[str, Any]]:
    """Train on forked ranks; the records of the run."""
    recipe = on_ranks(recipe, world_size)
    run_ranks(train_rank, world_size, recipe, stop_at_step)
    return read_metrics(recipe)


def on_ranks(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe for so many ranks, with its run folder claimed."""
    recipe = change(
        recipe,
        parallel={"data_parallel_size": world_size // recipe.parallel.tensor_model_parallel_size},
    )
    recipe.check()
    RunFolder(recipe.run_folder).claim(recipe, "")
    return recipe


def read_metrics(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunFolder(recipe.run_folder).metrics_file.read_text().splitlines()]


def train_rank(rank: int, world_size: int, recipe: Recipe, stop_at_step: int | None = None) -> None:
    """What one rank does."""
    from pretrain.topology import connect
    from pretrain.training.loop import train

    torch.set_num_threads(1)
    train(recipe, connect(recipe), stop_at_step)
