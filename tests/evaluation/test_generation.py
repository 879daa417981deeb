"""Repetition and variety of texts, against counting in plain Python."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pretrain.data.windows import TokenStream
from pretrain.evaluation.generation import NEW_TOKENS, PROMPT_TOKENS, PROMPTS, measure_generation, text_statistics
from pretrain.evaluation.subject import Subject

VOCAB = 20


def texts(seed: int = 0, texts: int = 5, length: int = 30) -> torch.Tensor:
    """Few different ids, so that n-grams repeat within a text and between texts."""
    return torch.randint(0, 3, (texts, length), generator=torch.Generator().manual_seed(seed)) * 7


def grams(row: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


def test_statistics_are_those_of_the_definition() -> None:
    ids, groups = texts(), (torch.arange(VOCAB) % 3).to(torch.int8)
    found = text_statistics(ids, groups)
    rows = ids.tolist()
    repeats = sum(gram in grams(row, 4)[:i] for row in rows for i, gram in enumerate(grams(row, 4)))
    assert found["repetition_4"] == pytest.approx(repeats / sum(len(grams(row, 4)) for row in rows))
    assert 0.05 < found["repetition_4"] < 0.95
    for n in range(1, 5):
        all_grams = [gram for row in rows for gram in grams(row, n)]
        assert found[f"distinct_{n}"] == pytest.approx(len(set(all_grams)) / len(all_grams))
    assert found["unique_tokens"] == len({i for row in rows for i in row})
    assert found["rare_share"] == pytest.approx(sum(i % 3 == 2 for row in rows for i in row) / ids.numel())
    assert 0 < found["rare_share"] < 1


def test_a_text_that_says_one_thing_and_one_that_says_all() -> None:
    groups = torch.zeros(200, dtype=torch.int8)
    stuck = text_statistics(torch.full((3, 23), 4), groups)
    assert stuck["repetition_4"] == 1 - 1 / 20 and stuck["distinct_4"] == 1 / 60 and stuck["unique_tokens"] == 1
    rich = text_statistics(torch.arange(60).view(3, 20), groups)
    assert rich["repetition_4"] == 0 and rich["distinct_1"] == rich["distinct_4"] == 1
    across = text_statistics(torch.arange(20).expand(2, -1), groups)
    assert across["repetition_4"] == 0 and across["distinct_4"] == 0.5  # between texts is no repetition


class Successor:
    """The next id is one more than the last."""

    device = torch.device("cpu")

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((tokens[:, -1] + 1) % VOCAB, VOCAB).float() * 50

    def agree(self, chosen: torch.Tensor) -> torch.Tensor:
        return chosen


class Letters:
    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def subject(total: int) -> Subject:
    ids = (torch.arange(total) ** 2 // 7) % VOCAB
    text = TokenStream("the test split", total, 0, lambda start, count: ids[start : start + count])
    counts = torch.arange(VOCAB, 0, -1)
    return Subject(Successor(), Letters(), text, 0, counts, window=64, micro_batch_size=1)


def test_what_is_generated_and_what_people_say() -> None:
    whole = subject(5_000)
    found = measure_generation(whole)
    assert found is not None
    assert (found["prompts"], found["prompt_tokens"], found["new_tokens"]) == (PROMPTS, PROMPT_TOKENS, NEW_TOKENS)
    assert found["greedy"]["unique_tokens"] == VOCAB and found["greedy"]["distinct_2"] == VOCAB / (PROMPTS * 63)
    assert found["greedy"]["repetition_4"] == pytest.approx(1 - VOCAB / 61)
    assert found["sampled"] == found["greedy"] | {"temperature": 1.0, "top_p": 0.9}  # nothing else is likely
    starts = [i * (5_000 // PROMPTS) for i in range(PROMPTS)]
    human = torch.stack([whole.text.read(start + PROMPT_TOKENS, NEW_TOKENS) for start in starts])
    assert found["human"] == text_statistics(human, whole.groups)
    assert [set(example) for example in found["examples"]] == [{"prompt", "greedy", "sampled", "human"}] * 3
    first, last = found["examples"][0], whole.text.read(0, PROMPT_TOKENS)[-1]
    assert first["prompt"] == Letters().decode(whole.text.read(0, PROMPT_TOKENS).tolist())
    assert first["greedy"].startswith(f"{int(last + 1) % VOCAB} {int(last + 2) % VOCAB} ")
    assert len(first["greedy"].split()) == NEW_TOKENS
    assert first["human"] == Letters().decode(whole.text.read(PROMPT_TOKENS, NEW_TOKENS).tolist())


def test_a_short_text_has_fewer_prompts() -> None:
    length = PROMPT_TOKENS + NEW_TOKENS
    assert measure_generation(subject(length - 1)) is None
    for total, prompts in ((length, 1), (2 * length + 5, 2)):
        found = measure_generation(dataclasses.replace(subject(total)))
        assert found is not None and found["prompts"] == prompts == len(found["examples"])
