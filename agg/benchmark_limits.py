"""Which sizes :mod:`agg.benchmark` runs, and what of them this machine has the memory and the time for.

Letters: V vocabulary, V_local rows of this rank's shard, D hidden size, T tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path

import torch
import torch.distributed as dist

from agg.benchmark_checks import CHUNK_TOKENS, exact_dtype
from agg.benchmark_sides import Case, bare_matmuls
from agg.linear_cross_entropy import default_chunk_tokens
from agg.vocab_shard import VocabShard

Size = tuple[int, int, int]  # V, D, T
MEMORY_SHARE = 0.9  # of what is available
# Peak of the sides that materialise logits, in units of a [T, V_local] float32: logits, log-softmax and gradient; the
# paper's form has two of everything. Measured on a CPU, V 8k x T 2k: 2.96, 2.96, 1.5 and 5.96. Others hold a chunk.
LOGITS_COPIES = {
    "torch cross_entropy": 3,
    "torch linear_cross_entropy": 3,
    "megatron-core vocab-parallel": 2,
    "paper's form": 6,
}
BUSY_SECONDS = 0.02  # a guess: the least is 0.01, and many launches need more
MEAN_SIDE = 2.5  # calls of three matmuls that a side takes, the mean of those measured on a CPU at D 256


def size_of(text: str) -> Size:
    """A size given to a command, as ``50257x256x8192``."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size VxDxT, such as 50257x256x8192")
    vocab_size, hidden_size, tokens = (int(part) for part in parts)
    return vocab_size, hidden_size, tokens


def default_sizes(device: str) -> list[Size]:
    if device == "cuda":
        return [(32_768, 1024, 8192), (50_257, 1024, 8192), (131_072, 4096, 8192)]
    return [(32_768, 256, 4096), (50_257, 256, 8192), (131_072, 256, 2048)]


def grid_sizes() -> list[Size]:
    """V 32k, 50k, 128k x D 256, 1024, 4096 x T 2k, 8k, and the size that a target of a CPU is stated for."""
    grid = list(itertools.product((32_768, 50_257, 131_072), (256, 1024, 4096), (2048, 8192)))
    return sorted([*grid, (32_768, 256, 4096)], key=lambda size: (size[0] * size[1] * size[2], size))


def available_bytes(device: str, shard: VocabShard) -> int | None:
    """Memory that one rank may take; None where it can't be told. The same on all ranks, those of a host share it."""
    if device == "cuda":
        torch.cuda.empty_cache()
        available = torch.cuda.mem_get_info()[0]
    else:
        available = host_bytes("MemAvailable") // shard.world_size
    least = shard.all_reduce(torch.tensor(available, device=device), op=dist.ReduceOp.MIN)
    return int(least) or None


def host_bytes(key: str) -> int:
    """Of a line in /proc/meminfo; 0 where there is none."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)


def base_bytes(size: Size, dtype: torch.dtype, device: str, shard: VocabShard) -> int:
    """Memory that a size takes on one rank whatever is compared.

    With s bytes an entry of the inputs and r of the dense answer (8 for float32 inputs, 4 for half precision)::

        2 s (V_local + T) D     inputs and gradients
        + 4 (V_local + T) D     float32 sums of the gated loss
        + (s + 8) C V_local     its chunk of C tokens, where that is not worked on in place
        + the larger of
          s T V_local + s (V_local + T) D    buffers of the bare matmuls
          (2 s + r) V D + 3 r 256 V          check: dense weight, its gradient, its copy, chunks of 256 tokens
    """
    (vocab_size, hidden_size, tokens), rows = size, len(shard)
    entry, exact = dtype.itemsize, exact_dtype(dtype).itemsize
    matrices = (rows + tokens) * hidden_size
    chunk = default_chunk_tokens(rows, tokens, device) * rows
    floor = entry * (tokens * rows + matrices)
    check = (2 * entry + exact) * vocab_size * hidden_size + 3 * exact * CHUNK_TOKENS * vocab_size
    return (2 * entry + 4) * matrices + (entry + 8) * chunk + max(floor, check)


def side_bytes(name: str, size: Size, shard: VocabShard) -> int:
    """What a side needs beyond that: ``LOGITS_COPIES`` times 4 T V_local."""
    return LOGITS_COPIES.get(name, 0) * 4 * size[2] * len(shard)


def beyond_memory(needed: int, available: int | None) -> str | None:
    """Why ``needed`` bytes are not to be had; None if they are, or if nobody can tell."""
    if available is None or needed <= MEMORY_SHARE * available:
        return None
    return f"needs {needed / 2**30:,.1f} GiB of memory, {MEMORY_SHARE:.0%} of what is available is " + (
        f"{MEMORY_SHARE * available / 2**30:,.1f}"
    )


def beyond_time(case: Case, sides: int, rounds: int, limit_seconds: float | None) -> str | None:
    """Why a size is not to be run, if it would take more than ``limit_seconds``.

    Its time is estimated as that of the three matmuls, times ``MEAN_SIDE`` for each call of each side (one in each
    round, to warm up, in the check and for memory; on a GPU the rounds and the first of them twice, and each once
    behind ``BUSY_SECONDS`` of other work), plus 6 for the dense answer and its budget.
    """
    if limit_seconds is None:
        return None
    timed, busy = rounds + 1, 0.0
    if case.hidden.device.type == "cuda":
        timed, busy = 2 * timed, sides * timed * BUSY_SECONDS
    estimate = matmul_seconds(case) * (MEAN_SIDE * sides * (timed + 2) + 6) + busy
    if estimate <= limit_seconds:
        return None
    return f"would take about {estimate:,.0f} s, the limit is {limit_seconds:,.0f} s"


def matmul_seconds(case: Case, tokens: int = 512) -> float:
    """Of the three matmuls, from one call with some of the tokens: the slowest of the tensor-parallel ranks."""
    few = dataclasses.replace(case, hidden=case.hidden[:tokens])
    run = bare_matmuls(few)
    run()
    synchronize(case)
    begin = time.perf_counter()
    run()
    synchronize(case)
    seconds = (time.perf_counter() - begin) * len(case.hidden) / len(few.hidden)
    slowest = torch.tensor(seconds, dtype=torch.float64, device=case.hidden.device)
    return float(case.shard.all_reduce(slowest, op=dist.ReduceOp.MAX))


def synchronize(case: Case) -> None:
    if case.hidden.device.type == "cuda":
        torch.cuda.synchronize()
