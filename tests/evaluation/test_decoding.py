"""Choosing the next token, and continuing texts with a model that says what it saw."""

from __future__ import annotations

import pytest
import torch

from pretrain.evaluation.decoding import choose, continue_ids

PROBABILITIES = [0.05, 0.4, 0.1, 0.3, 0.15]


def choices(temperature: float, top_p: float, draws: int = 100_000) -> list[float]:
    """How often each token is chosen, over evenly spread draws."""
    logits = torch.tensor(PROBABILITIES, dtype=torch.float64).log().expand(draws, -1)
    chosen = choose(logits, torch.arange(draws, dtype=torch.float64) / draws, temperature, top_p)
    return (torch.bincount(chosen, minlength=5) / draws).tolist()


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (0.0, 1.0, [0, 1, 0, 0, 0]),
        (1.0, 1.0, PROBABILITIES),
        (1.0, 1e-9, [0, 1, 0, 0, 0]),
        (1.0, 0.39, [0, 1, 0, 0, 0]),
        (1.0, 0.41, [0, 4 / 7, 0, 3 / 7, 0]),
        (1.0, 0.9, [0, 0.4 / 0.95, 0.1 / 0.95, 0.3 / 0.95, 0.15 / 0.95]),
        (0.5, 1.0, [p**2 / 0.285 for p in PROBABILITIES]),
    ],
)
def test_tokens_are_drawn_from_the_nucleus(temperature: float, top_p: float, expected: list[float]) -> None:
    assert choices(temperature, top_p) == pytest.approx(expected, abs=2e-5)


def test_a_tiny_temperature_takes_the_most_likely() -> None:
    """Divided by it, logits as they are would be infinite."""
    logits = torch.tensor([[-7.0, 30.0, 12.0], [50.0, -80.0, 49.0]])
    assert choose(logits, torch.full((2,), 0.7, dtype=torch.float64), 5e-324, 1.0).tolist() == [1, 0]


def test_the_last_draw_stays_in_the_nucleus() -> None:
    logits = torch.randn(2_000, 300, generator=torch.Generator().manual_seed(0))
    draws = torch.full((2_000,), 1 - 2.0**-53, dtype=torch.float64)
    chosen = choose(logits, draws, 1.0, 0.9)
    falling, ids = logits.double().softmax(1).sort(1, descending=True)
    place = (ids == chosen[:, None]).nonzero()[:, 1]
    before = (falling.cumsum(1) - falling).gather(1, place[:, None])[:, 0]
    assert (before < 0.9).all() and (before + falling.gather(1, place[:, None])[:, 0] >= 0.9).all()


class Counting:
    """Says the sum of what it sees, modulo 50; a second answer is half as likely."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen.append(tokens.tolist())
        logits = torch.full((len(tokens), 50), -100.0)
        sums = tokens.sum(1) % 50
        rows = torch.arange(len(tokens))
        logits[rows, sums], logits[rows, (sums + 1) % 50] = 2.0, 1.3
        return logits

    def agree(self, chosen: torch.Tensor) -> torch.Tensor:
        return chosen


def test_greedy_texts_see_their_window() -> None:
    model = Counting()
    found = continue_ids(model, torch.tensor([[1, 2, 3], [4, 4, 4]]), 3, window=4)
    assert found.tolist() == [[1, 2, 3, 6, 12, 23], [4, 4, 4, 12, 24, 44]]
    assert model.seen[-1] == [[2, 3, 6, 12], [4, 4, 12, 24]] and model.seen[0] == [[1, 2, 3], [4, 4, 4]]


def test_a_text_stops_when_told() -> None:
    assert continue_ids(Counting(), torch.tensor([[1, 2, 3]]), 9, 4, stop_id=12).tolist() == [[1, 2, 3, 6, 12]]
    assert continue_ids(Counting(), torch.tensor([[1, 2, 3], [1, 1, 1]]), 2, 4, stop_id=6).shape == (2, 5)


def test_samples_depend_on_the_seed_alone() -> None:
    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(torch.seed() % 1000)  # the global generator has no say
        return continue_ids(Counting(), torch.ones(4, 3).long(), 20, 8, temperature=1.0, seed=seed).tolist()

    assert sample(1) == sample(1) != sample(2)
    assert len({tuple(row) for row in sample(1)}) == 4  # each text has draws of its own
