"""All measures of a run: the same on any layout, and the perplexities as one forward pass for each token has them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.data.windows import TokenStream
from pretrain.evaluation.frequency_groups import frequency_groups
from pretrain.evaluation.group_names import GROUPS
from pretrain.recipe import Recipe
from tests.distributed import run_ranks
from tests.small_runs import change

TOKENS, WINDOW, STRIDE = 333, 32, 7  # round(32 * 112 / 512)


@pytest.fixture(scope="module")
def recipe(prepared_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Untied, and with weights that tell tokens apart without training."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    file.write_text(
        "".join(f"{a}{b}\t{b}{a}\t{i}\n" for i, (a, b) in enumerate(zip("abcdefgh", "ponmlkji", strict=True)))
    )
    return change(
        prepared_recipe,
        model={"init_std": 0.3, "tied_embeddings": False},
        reporting={"word_similarity": (str(file),)},
    )


def subject_on(recipe: Recipe) -> tuple[Any, Any]:
    """The run before its first step, with the first tokens of its test split as text."""
    from pretrain.evaluation.run_model import subject_of_run
    from pretrain.topology import connect
    from pretrain.training.setup import build_run

    run = build_run(recipe, connect(recipe))
    run.prepared.token_counts[100:130] = 0
    run.engine.eval()
    subject = subject_of_run(run, "test")
    ids = subject.text.read(0, TOKENS)
    text = TokenStream("the test split", TOKENS, subject.text.padding, lambda start, count: ids[start : start + count])
    return run, dataclasses.replace(subject, text=text, text_bytes=1000)


def measured(rank: int, world_size: int, recipe: Recipe) -> dict[str, Any]:
    from pretrain.evaluation.measures import measure

    _, subject = subject_on(recipe)
    found, arrays = measure(subject, [Path(name) for name in recipe.reporting.word_similarity])
    return found | {"arrays": arrays}


@torch.no_grad()
def token_by_token(rank: int, world_size: int, recipe: Recipe, stride: int) -> dict[str, Any]:
    """The definition: each token from the logits after the tokens that its window has before it."""
    run, subject = subject_on(recipe)
    ids, groups = subject.text.read(0, TOKENS), frequency_groups(subject.token_counts)
    losses: dict[str, list[float]] = {name: [] for name in (*GROUPS, "total")}
    predicted: dict[str, set[int]] = {name: set() for name in (*GROUPS, "total")}
    for place in range(1, TOKENS):
        start = stride * max(0, math.ceil((place - WINDOW) / stride))
        logits = run.engine(ids[None, start:place])[0].double()
        loss = float(torch.nn.functional.cross_entropy(logits, ids[place]))
        best = int(logits.argmax())
        for name, of in ((GROUPS[groups[ids[place]]], losses), ("total", losses)):
            of[name].append(loss)
        predicted[GROUPS[groups[best]]].add(best)
        predicted["total"].add(best)
    return {
        "perplexity": {name: math.exp(np.mean(values)) for name, values in losses.items()},
        "unique_tokens": {name: len(values) for name, values in predicted.items()},
        "bits": sum(losses["total"]) / math.log(2),
    }


@pytest.fixture(scope="module")
def alone(recipe: Recipe) -> dict[str, Any]:
    return run_ranks(measured, 1, recipe)[0]


def test_perplexities_are_those_of_one_forward_pass_for_each_token(recipe, alone):
    plain, sliding = (run_ranks(token_by_token, 1, recipe, stride)[0] for stride in (WINDOW, STRIDE))
    assert {key: alone["sliding_window"][key] for key in ("window", "stride")} == {"window": WINDOW, "stride": STRIDE}
    for found, expected in ((alone, plain), (alone["sliding_window"], sliding)):
        assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
        assert found["unique_tokens"] == expected["unique_tokens"]
    assert abs(plain["perplexity"]["total"] / sliding["perplexity"]["total"] - 1) > 1e-3  # they can be told apart
    assert alone["target_tokens"]["total"] == TOKENS - 1


def test_bits_are_of_the_bytes_of_what_is_predicted(recipe, alone):
    """The text is said to have 1,000 bytes; the first token has those of its own."""
    plain, sliding = (run_ranks(token_by_token, 1, recipe, stride)[0] for stride in (WINDOW, STRIDE))
    first = run_ranks(first_bytes, 1, recipe)[0]
    assert first >= 1
    expected = {"non_overlapping": plain["bits"] / (1000 - first), "sliding_window": sliding["bits"] / (1000 - first)}
    expected["text_bytes"] = 1000
    assert alone["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def first_bytes(rank: int, world_size: int, recipe: Recipe) -> int:
    _, subject = subject_on(recipe)
    return len(subject.codec.decode(subject.text.read(0, 1).tolist()).encode())


def test_the_manifest_counts_the_bytes_that_tokens_stand_for(prepared_recipe):
    from pretrain.data.prepared import PreparedData
    from pretrain.data.windows import split_tokens

    prepared = PreparedData.open(prepared_recipe)
    stream = split_tokens(prepared, "test")
    text = prepared.tokenizer.decode(stream.read(0, stream.total).tolist())
    assert len(text.encode()) == prepared.manifest.splits["test"].text_bytes


LAYOUTS = [(1, 2, "zero1"), (1, 4, "zero2"), (2, 1, "zero1"), (4, 1, "zero0"), (2, 2, "zero3"), (1, 2, "zero3")]


@pytest.mark.parametrize(("tensor_parallel", "data_parallel", "sharding"), LAYOUTS)
def test_every_layout_measures_the_same(recipe, alone, tensor_parallel, data_parallel, sharding):
    parallel = {
        "tensor_model_parallel_size": tensor_parallel,
        "data_parallel_size": data_parallel,
        "sharding": sharding,
    }
    together = run_ranks(measured, tensor_parallel * data_parallel, change(recipe, parallel=parallel))
    for found in together:
        assert_alike(found, alone, "")
    assert alone["generation"]["prompts"] == 3 and alone["input_embedding"] is not None
    assert alone["under_trained_tokens"]["reference"] == "never_seen"


def assert_alike(found: Any, expected: Any, where: str) -> None:
    """Numbers to a part in 10,000, everything else exactly; cosines of a histogram may change bins."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_alike(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_alike(one, other, f"{where}[{i}]")
    elif isinstance(expected, np.ndarray):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=where)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-9), where
    else:
        assert found == expected, where
