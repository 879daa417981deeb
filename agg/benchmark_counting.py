"""What counting targets and making gates takes in one optimizer step: the calls that :mod:`agg.benchmark` times."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from agg.benchmark_sides import Case
from agg.module import AdaptiveGradientGating

WINDOW_STEPS = 8  # so few that the window is full at once; a step costs the same in a long one


def counting_calls(case: Case) -> dict[str, Callable[[], None]]:
    """One optimizer step each, in a full window: a step enters the counts, another leaves, gates are made anew."""
    return {
        "counting and gating, alpha": _call(case, alpha=case.alpha),
        "counting and gating, rare_fraction": _call(case, rare_fraction=0.5),
    }


def _call(case: Case, **threshold: Any) -> Callable[[], None]:
    gating = AdaptiveGradientGating(case.shard, window_steps=WINDOW_STEPS, excluded_ids=(0, 1), **threshold)
    # Shifted, so that what leaves the window is not what enters it.
    steps = [(case.target + shift) % case.shard.vocab_size for shift in range(WINDOW_STEPS + 1)]
    turn = itertools.cycle(steps)

    def call() -> None:
        gating.begin_step(next(turn))
        gating.current_gates()

    for _ in steps:
        call()
    return call
