"""Peak memory and time of what :mod:`agg.benchmark` compares, and how well the median of a ratio is known."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from agg.benchmark_limits import synchronize
from agg.benchmark_sides import Case, Side, bare_matmuls, run_side

CONFIDENCE = 0.95


def peak_extra_bytes(case: Case, call: Callable[[], Any]) -> int | None:
    """Peak memory of a call beyond inputs and the two gradients it makes; None where it can't be told."""
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in (case.hidden, case.weight))
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


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def time_interleaved(
    case: Case, sides: dict[str, Side], rounds: int, others: dict[str, Callable[[], Any]] | None = None
) -> dict[str, list[float]]:
    """Seconds of every side, of the bare matmuls and of ``others`` in every round. One round warms up.

    The order turns from round to round.
    """
    calls: dict[str, Callable[[], Any]] = {name: partial(run_side, case, side) for name, side in sides.items()}
    calls |= {"three matmuls": bare_matmuls(case), **(others or {})}
    names, seconds = list(calls), {name: list[float]() for name in calls}
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if case.shard.world_size > 1:
                dist.barrier(group=case.shard.group)
            synchronize(case)
            begin = time.perf_counter()
            calls[name]()
            synchronize(case)
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


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
