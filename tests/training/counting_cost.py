"""What counting and gating take of the steps of a training run:

    torchrun --standalone --nproc-per-node 2 -m tests.training.counting_cost \
        train quickstart_agg name=counting_cost batch.train_steps=300 \
        reporting.geometry_every_steps=0 reporting.validate_every_steps=0

trains as ``python -m pretrain`` does, and ends with the median and quartiles over all steps but the first ones. Of each
step are taken the time that the clock shows, which holds what other threads and processes do meanwhile (the next batch
is read then), and the time that the training thread itself was computing.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

WARM_UP = 20
CLOCKS = {"by the clock": time.perf_counter, "of its thread": time.thread_time}


class StepTimes:
    """Seconds of each step, by both clocks, in what was wrapped."""

    def __init__(self) -> None:
        self.begins: list[list[float]] = []
        self.spent: list[list[float]] = []

    def wrap(self, function: Callable[..., Any], *, begins_step: bool) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            before = [clock() for clock in CLOCKS.values()]
            if begins_step:
                self.begins.append(before)
                self.spent.append([0.0] * len(before))
            try:
                return function(*arguments, **options)
            finally:
                for index, (clock, then) in enumerate(zip(CLOCKS.values(), before, strict=True)):
                    self.spent[-1][index] += clock() - then

        return timed

    def lines(self) -> list[str]:
        steps = [after[0] - before[0] for before, after in zip(self.begins, self.begins[1:], strict=False)][WARM_UP:]
        lines = [f"a step: {_quartiles([1e3 * step for step in steps], 'ms')}, {len(steps)} steps"]
        for index, name in enumerate(CLOCKS):
            spent = [of_step[index] for of_step in self.spent[WARM_UP:-1]]
            shares = [100 * of_step / step for of_step, step in zip(spent, steps, strict=True)]
            took = _quartiles([1e3 * of_step for of_step in spent], "ms")
            lines.append(f"counting and gating, {name}: {took}; of its step {_quartiles(shares, '%')}")
        return lines


def _quartiles(values: Sequence[float], unit: str) -> str:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.2f} [{low:.2f} {high:.2f}] {unit}"


def main(arguments: Sequence[str]) -> int:
    from agg import AdaptiveGradientGating
    from pretrain.__main__ import main as pretrain

    times = StepTimes()
    for name in ("begin_step", "current_gates"):
        method = getattr(AdaptiveGradientGating, name)
        setattr(AdaptiveGradientGating, name, times.wrap(method, begins_step=name == "begin_step"))
    code = pretrain(arguments)
    if code == 0 and os.environ.get("RANK", "0") == "0":
        print("\n".join(times.lines()))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
