"""What gating adds to a loss call, timed inside the calls, as a ratio of whole calls has more noise than that:

    python -m tests.agg.gating_cost 8192x128x1024 32768x256x4096 --rounds 15

for sizes VxDxT, on a CPU. A round is a gated and an ungated call, in an order drawn anew; what is taken of it is how
much longer the functions in ``PARTS``, which hold all operations that gating adds, took in the gated one. What gating
does to the caches of the others is not in this.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from agg import sweep
from agg.benchmark_limits import Size, size_of
from agg.benchmark_sides import OURS, make_case, run_side, sides_of
from agg.gradient_sums import GradientSums
from agg.vocab_shard import VocabShard

PARTS: tuple[tuple[Any, str], ...] = (
    (sweep.Job, "target_is_rare"),
    (sweep, "row_factors"),
    (sweep.Sweep, "_gate_at_turn"),
    (sweep.Sweep, "_complete_rows"),
    (GradientSums, "gradients"),
)


class Stopwatch:
    """Seconds in each function that is wrapped, but not in those that another one of them calls."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.is_inside = False

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if self.is_inside:
                return function(*arguments, **options)
            self.is_inside, begin = True, time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name] += time.perf_counter() - begin
                self.is_inside = False

        return timed

    @contextmanager
    def on_parts(self) -> Iterator[None]:
        functions = [getattr(owner, name) for owner, name in PARTS]
        for (owner, name), function in zip(PARTS, functions, strict=True):
            setattr(owner, name, self.wrap(name, function))
        try:
            yield
        finally:
            for (owner, name), function in zip(PARTS, functions, strict=True):
                setattr(owner, name, function)


def measure(size: Size, rounds: int) -> list[dict[str, Counter[str]]]:
    """Of each round, of each of ``OURS``: seconds in the parts, and in the whole call under ``call``."""
    case = make_case(*size, torch.float32, "cpu", VocabShard(0, size[0], size[0]))
    sides, _ = sides_of(case)
    found: list[dict[str, Counter[str]]] = []
    for number in range(rounds + 1):  # the first warms up
        found.append({})
        for name in random.Random(number).sample(OURS, len(OURS)):
            watch = Stopwatch()
            with watch.on_parts():
                begin = time.perf_counter()
                run_side(case, sides[name])
                watch.seconds["call"] = time.perf_counter() - begin
            found[-1][name] = watch.seconds
    return found[1:]


def lines(size: Size, found: list[dict[str, Counter[str]]]) -> list[str]:
    """A line for each part, and one for all of them, which need not be the sum of the medians above it."""
    gated, ungated = OURS
    more = {name: [1e3 * (of_round[gated][name] - of_round[ungated][name]) for of_round in found] for _, name in PARTS}
    more["all"] = [sum(of_round) for of_round in zip(*more.values(), strict=True)]
    call = 1e3 * statistics.median(of_round[ungated]["call"] for of_round in found)
    text = [f"V {size[0]:,}  D {size[1]:,}  T {size[2]:,}: an ungated call takes {call:,.2f} ms; a gated one adds"]
    for name, values in more.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        text.append(f"  {name:22}{median:8.3f} [{low:.3f} {high:.3f}] ms{100 * median / call:8.2f} %")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.agg.gating_cost")
    parser.add_argument("sizes", nargs="+", type=size_of, metavar="VxDxT")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    for size in options.sizes:
        print("\n".join(lines(size, measure(size, options.rounds))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
