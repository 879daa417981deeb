"""The figures of :mod:`tests.agg.gating_cost` are those of all that gating adds."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agg import VocabShard, gated_linear_cross_entropy, sweep
from agg.benchmark_sides import make_case, run_side
from tests.agg import gating_cost

SIZE = (515, 8, 64)


def test_a_slow_part_is_seen(capsys, monkeypatch):
    """5 ms more in a function that only a gated call needs."""
    quick = sweep.row_factors

    def slow(*arguments):
        time.sleep(0.005)
        return quick(*arguments)

    monkeypatch.setattr(sweep, "row_factors", slow)
    assert gating_cost.main(["515x8x64", "--rounds", "3"]) == 0
    assert sweep.row_factors is slow  # as it was before
    text = capsys.readouterr().out
    assert "V 515  D 8  T 64" in text
    assert float(re.search(r"^  row_factors +([\d.]+) ", text, re.MULTILINE)[1]) >= 5


def test_a_part_within_another_counts_once():
    watch = gating_cost.Stopwatch()
    inner = watch.wrap("inner", lambda: time.sleep(0.002))
    watch.wrap("outer", inner)()
    assert set(watch.seconds) == {"outer"} and watch.seconds["outer"] >= 0.002
    inner()
    assert watch.seconds["inner"] >= 0.002


class Calls(TorchDispatchMode):
    """Names of the operations outside of all parts."""

    def __init__(self, watch: gating_cost.Stopwatch) -> None:
        super().__init__()
        self.watch, self.names = watch, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.watch.is_inside:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("left_out", [None, *(name for _, name in gating_cost.PARTS)])
def test_nothing_else_is_added(monkeypatch, left_out):
    """Outside of the parts a gated call has the operations of an ungated one; with any of them left out, more."""
    parts = tuple(part for part in gating_cost.PARTS if part[1] != left_out)
    monkeypatch.setattr(gating_cost, "PARTS", parts)
    case = make_case(*SIZE, torch.float32, "cpu", VocabShard(0, SIZE[0], SIZE[0]))
    names = {}
    for name, gates in (("gated", case.gates), ("ungated", None)):
        watch = gating_cost.Stopwatch()
        with ExitStack() as stack:
            stack.enter_context(watch.on_parts())
            calls = stack.enter_context(Calls(watch))
            loss = partial(gated_linear_cross_entropy, target=case.target, gates=gates, chunk_tokens=20)
            run_side(case, loss)
        names[name] = calls.names
    assert len(names["ungated"]) > 20
    assert (names["gated"] == names["ungated"]) == (left_out is None)
