"""Peak memory and time of what :mod:`agg.benchmark` compares, and how well the median of a ratio is known."""

from __future__ import annotations

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from agg.benchmark_limits import synchronize
from agg.benchmark_sides import Case, Side, bare_matmuls, run_side
from agg.vocab_shard import VocabShard

CONFIDENCE = 0.95
FEWEST_CYCLES, MOST_CYCLES = 2 * 10**7, 32 * 10**7  # that a GPU is kept busy for: 10 to 160 ms


def peak_extra_bytes(case: Case, call: Callable[[], Any]) -> int | None:
    """Peak memory of a call beyond inputs and the two gradients it makes; None where it can't be told."""
    gradients = _gradient_bytes(case)
    gc.collect()
    if case.hidden.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return max(0, torch.cuda.max_memory_allocated() - before - gradients)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before - gradients)


def _gradient_bytes(case: Case) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (case.hidden, case.weight))


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def time_interleaved(
    case: Case,
    sides: dict[str, Side],
    rounds: int,
    memory: Mapping[str, int | None],
    others: dict[str, Callable[[], Any]] | None = None,
    *,
    from_idle: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every side, of the bare matmuls and of ``others`` in every round. One round warms up.

    The order is drawn anew for each round, the same on all ranks: in a fixed one each side would always inherit what
    the same other side leaves behind.

    On a GPU they are those of the GPU alone, behind work that keeps it busy while the host launches what is timed, as
    the layers of a model do in training; see :class:`BusyDevice`.

    Args:
        memory: what :func:`peak_extra_bytes` found.
        from_idle: on a GPU, by the clock of the host instead, from an idle GPU to an idle GPU.
    """
    calls: dict[str, Callable[[], Any]] = {name: partial(run_side, case, side) for name, side in sides.items()}
    calls |= {"three matmuls": bare_matmuls(case), **(others or {})}
    names, seconds = list(calls), {name: list[float]() for name in calls}
    on_gpu = case.hidden.device.type == "cuda" and not from_idle
    clocks = {name: BusyDevice(case.shard).seconds if on_gpu else partial(_clock, case) for name in names}
    for number in range(rounds + 1):
        for name in random.Random(number).sample(names, len(names)):
            _touch_free_memory(case, memory.get(name) if name in sides else None)
            if case.shard.world_size > 1:
                dist.barrier(group=case.shard.group)
            synchronize(case)
            taken = clocks[name](calls[name])
            if number:
                seconds[name].append(taken)
    return seconds


def _clock(case: Case, call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    synchronize(case)
    return time.perf_counter() - begin


class BusyDevice:
    """Times a call on a GPU that has something else to do until the call is launched.

    Else small sizes would tell how fast Python is. How long that has to be is found by trying, up to ``MOST_CYCLES``:
    a call that waits for the GPU, or launches more than fits into its queue, is timed with the gaps that it leaves.

    Args:
        shard: its tensor-parallel ranks, which all time the same call, try again together.
    """

    def __init__(self, shard: VocabShard) -> None:
        self._shard, self._cycles = shard, FEWEST_CYCLES

    def seconds(self, call: Callable[[], Any]) -> float:
        while True:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(self._cycles)
            begin.record()
            call()
            end.record()
            was_busy = self._on_all_ranks(not begin.query())
            if was_busy or self._cycles >= MOST_CYCLES:
                taken: float = begin.elapsed_time(end) / 1e3
                return taken
            self._cycles *= 4

    def _on_all_ranks(self, truth: bool) -> bool:
        torch.cuda.synchronize()
        if self._shard.world_size == 1:
            return truth
        told = torch.tensor(int(truth), device=torch.cuda.current_device())
        return bool(self._shard.all_reduce(told, op=dist.ReduceOp.MIN))


def _touch_free_memory(case: Case, extra_bytes: int | None) -> None:
    """So that a call finds what it will need in one state, whatever ran before.

    A virtual machine may give memory that lies free for seconds back to its host, from where it comes slowly: after 9 s
    of matmuls that allocate nothing, a call that took 512 MiB anew was seen to take 6 % longer.
    """
    if extra_bytes is not None and case.hidden.device.type == "cpu":
        torch.empty(extra_bytes + _gradient_bytes(case), dtype=torch.uint8).fill_(1)


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Of the time of ``name`` over that of ``base`` within a round.

    Returns:
        median; low, high: quartiles over rounds; interval_low, interval_high: see :func:`median_interval`.
    """
    ratios = [one / other for one, other in zip(seconds[name], seconds[base], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    first, last = median_interval(ratios)
    return {"median": median, "low": low, "high": high, "interval_low": first, "interval_high": last}


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the true median lies with 95 % confidence, from order statistics: no distribution is assumed.

    That is from the k-th smallest to the k-th largest value, k the largest with ``2 P(B < k) <= 0.05``, B the number
    of n values below the true median, binomial (n, 1/2): k = 2 for 9 values. Fewer than 6 values can't give 95 %;
    then it is all of them.
    """
    k, below = 1, 2.0 ** -len(values)  # below = P(B < k)
    while 2 * (below + (more := math.comb(len(values), k) / 2 ** len(values))) <= 1 - CONFIDENCE:
        k, below = k + 1, below + more
    ordered = sorted(values)
    return ordered[k - 1], ordered[-k]
