"""How fast an all-reduce is, and how far the nodes' clocks are apart."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from pretrain.topology import Topology

MESSAGE_BYTES = {"cpu": 2**20, "cuda": 2**26}
REPEATS = 3


def measure_all_reduce(topology: Topology, seconds: float) -> float:
    """The bus bandwidth of an all-reduce over all ranks, the best of three; its result is checked.

    Args:
        seconds: to wait for one.

    Returns:
        10^9 bytes per second: 2 (n - 1) / n times the message's bytes, over the time that it takes.

    Raises:
        ArithmeticError: the sum is wrong.
        RuntimeError: it failed, or did not end in time.
    """
    device, ranks = topology.device, topology.world_size
    size = MESSAGE_BYTES[device.type]
    pattern = torch.arange(size // 4, dtype=torch.int32, device=device) % 1024  # whole numbers add up exactly
    expected = pattern * ranks + ranks * (ranks - 1) // 2
    best = float("inf")
    for _ in range(1 + REPEATS):  # the first one connects
        message = pattern + topology.rank
        _finish(device)
        begin = time.perf_counter()
        work = dist.all_reduce(message, async_op=True)
        assert work is not None
        work.wait(datetime.timedelta(seconds=seconds))
        _finish(device)
        best = min(best, time.perf_counter() - begin)
        if not torch.equal(message, expected):
            raise ArithmeticError("the sum is wrong")
    return 2 * (ranks - 1) / ranks * size / best / 1e9


def read_clocks(topology: Topology) -> list[tuple[float, float]]:
    """This rank's clock before and after each of a few reductions over all ranks, in seconds since 1970.

    No rank can leave a reduction before the last one has entered it, so that moment lies in the interval of every rank.
    """
    nothing, intervals = torch.zeros(1, device=topology.device), []
    for _ in range(1 + REPEATS):
        enter = time.time()
        dist.all_reduce(nothing)
        nothing.item()  # waits for a GPU
        intervals.append((enter, time.time()))
    return intervals


def clock_offsets(intervals: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, tuple[float, float]]:
    """How far each clock is ahead of the first one, from intervals that share a moment.

    Args:
        intervals: of each node, as :func:`read_clocks` gives them.

    Returns:
        Seconds, and how much they can be wrong: a clock that lies outside is surely not right.
    """
    first = next(iter(intervals.values()))
    offsets = {}
    for node, own in intervals.items():
        low = max(enter - leave for (enter, _), (_, leave) in zip(own, first, strict=True))
        high = min(leave - enter for (_, leave), (enter, _) in zip(own, first, strict=True))
        offsets[node] = ((low + high) / 2, (high - low) / 2)
    return offsets


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
