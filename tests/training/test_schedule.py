"""Learning rates at the corners of each schedule."""

from __future__ import annotations

import itertools
import math

import pytest

from pretrain.training.schedule import learning_rate
from tests.small_runs import change


def rates(recipe, steps, **schedule):
    recipe = change(recipe, optimizer={"learning_rate": 2.0}, batch={"train_steps": steps}, schedule=schedule)
    recipe.check()
    return [learning_rate(recipe, step) for step in range(steps)]


def test_cosine(prepared_recipe):
    values = rates(prepared_recipe, 110, kind="cosine", warmup_steps=10, min_learning_rate_ratio=0.1)
    assert values[:3] == pytest.approx([0.2, 0.4, 0.6]) and values[9] == values[10] == 2.0
    assert values[60] == pytest.approx((2.0 + 0.2) / 2)
    assert values[-1] == pytest.approx(0.2, rel=1e-2) and values == values[:10] + sorted(values[10:], reverse=True)


def test_cosine_that_ends_early_stays_low(prepared_recipe):
    values = rates(prepared_recipe, 100, kind="cosine", decay_steps=50, min_learning_rate_ratio=0.25)
    assert values[50:] == pytest.approx([0.5] * 50)


def test_inverse_sqrt(prepared_recipe):
    values = rates(prepared_recipe, 100, kind="inverse_sqrt", warmup_steps=16)
    assert values[15] == 2.0 and values[63] == pytest.approx(2.0 * math.sqrt(16 / 64))


def test_constant(prepared_recipe):
    assert rates(prepared_recipe, 20, kind="constant", warmup_steps=4)[3:] == [2.0] * 17


def test_warmup_stable_decay(prepared_recipe):
    values = rates(
        prepared_recipe, 100, kind="warmup_stable_decay", warmup_steps=10, decay_steps=20, min_learning_rate_ratio=0.0
    )
    assert values[9:81] == [2.0] * 72 and values[90] == pytest.approx(1.0) and values[99] == pytest.approx(0.1)


def test_a_decay_that_begins_in_the_warm_up(prepared_recipe):
    """The lower of both: no jump where the warm-up ends."""
    shape = {"kind": "warmup_stable_decay", "warmup_steps": 50, "min_learning_rate_ratio": 0.0}
    values = rates(prepared_recipe, 100, **shape, decay_steps=100)
    top = values.index(max(values))
    assert values[:top] == pytest.approx([0.04 * (step + 1) for step in range(top)])
    assert values[top:] == pytest.approx([2 - 0.02 * step for step in range(top, 100)])
    assert 30 < top < 35 and max(abs(one - other) for one, other in itertools.pairwise(values)) == pytest.approx(2 / 50)
