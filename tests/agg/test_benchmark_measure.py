"""How the benchmark takes times: in which order, on a GPU, and how well it knows a median."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from agg import (
    VocabShard,
)
from agg.benchmark_measure import BusyDevice, median_interval, time_interleaved
from tests.agg.test_benchmark import SIZE, whole
from tests.distributed import run_ranks


def test_no_side_always_follows_the_same_other(monkeypatch):
    """And each finds the memory that it will need touched."""
    case, order, touched = whole(), [], []

    def side(name):
        def loss_of(hidden, weight):
            order.append(name)
            return hidden.sum() + weight.sum()

        return loss_of

    empty = torch.empty

    def seen(*size, **options):
        if options.get("dtype") == torch.uint8:
            touched.append((len(order), size[0]))
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", seen)
    memory = {"a": 1000, "b": 2000, "c": None, "three matmuls": 5000}  # these allocate nothing, and take no memory then
    time_interleaved(case, {name: side(name) for name in "abc"}, 12, memory)
    gradients = 4 * SIZE[1] * (SIZE[0] + SIZE[2])
    assert touched == [(i, gradients + memory[name]) for i, name in enumerate(order) if memory[name]]
    rounds = [order[begin : begin + 3] for begin in range(0, len(order), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    follows = {pair for names in rounds for pair in itertools.pairwise(names)}
    assert follows == set(itertools.permutations("abc", 2))


class FakeGpu:
    """Its queue empties after so many cycles of sleep; what is launched takes 3 ms."""

    def __init__(self, needed: int) -> None:
        self.needed, self.slept = needed, []

    def install(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "_sleep", self.slept.append)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                assert gpu.slept  # something to do comes first

            def query(self):
                return gpu.slept[-1] < gpu.needed

            def elapsed_time(self, end):
                return 3.0

        monkeypatch.setattr(torch.cuda, "Event", Event)


@pytest.mark.parametrize(("needed", "sleeps"), [(0, [2, 2]), (5, [2, 8, 8]), (1000, [2, 8, 32, 32])])
def test_a_gpu_is_kept_busy_until_the_call_is_launched(monkeypatch, needed, sleeps):
    """And what was enough is kept; a call that is never launched in time is timed in the end."""
    gpu, calls = FakeGpu(needed * 10**7), []
    gpu.install(monkeypatch)
    device = BusyDevice(VocabShard(0, 5, 5))
    assert [device.seconds(lambda: calls.append(1)) for _ in range(2)] == [0.003] * 2
    assert [cycles / 10**7 for cycles in gpu.slept] == sleeps and len(calls) == len(sleeps)


def busy_rank(rank, world_size):
    """Rank 1 launches later than rank 0, and both make a collective in the call."""
    gpu, calls = FakeGpu((1 + 20 * rank) * 10**7), []
    with pytest.MonkeyPatch.context() as patch:
        gpu.install(patch)
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        device = BusyDevice(VocabShard.of_rank(512, rank, world_size, dist.group.WORLD))

        def call():
            calls.append(1)
            dist.all_reduce(torch.ones(3))

        return [device.seconds(call) for _ in range(2)], gpu.slept, len(calls)


def test_ranks_keep_their_gpus_busy_as_long():
    first, second = run_ranks(busy_rank, 2)
    assert first == second == ([0.003] * 2, [2 * 10**7, 8 * 10**7, 32 * 10**7, 32 * 10**7], 4)


def test_interval_of_the_median():
    assert median_interval(range(9)) == (1, 7)  # 2 P(B < 2) = 0.039 with B of (9, 1/2)
    assert median_interval(range(11)) == (1, 9)  # k = 3 would hold it with 2 P(B < 3) = 0.065
    assert median_interval(range(5)) == (0, 4) and median_interval(range(6)) == (0, 5)
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2000, 9, generator=generator).tolist()
    held = sum(low <= 0.5 <= high for low, high in map(median_interval, draws))
    assert 0.95 <= held / len(draws) <= 0.975
