"""``python -m agg.benchmark``: what gating costs, against the plain loss, three bare matmuls, and peers.

All sides run in turn in every round of one process, so a ratio is taken within a round and its median and quartiles
over rounds; absolute times of a shared machine mean little. Gradients are compared before anything is timed.

    python -m agg.benchmark                                   # sizes that fit this machine
    python -m agg.benchmark --sizes 50257x256x8192 --rounds 9 --output result.json
    python -m agg.benchmark --tensor-parallel 2               # two local ranks, half of the vocabulary each
    python -m agg.benchmark --sides torch                     # beside ours only the sides of torch

Letters in sizes: V x D x T, vocabulary, hidden size, tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from agg.benchmark_sides import Case, Side, bare_matmuls, make_case, sides_of
from agg.vocab_shard import VocabShard

GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of the largest entry


def run_side(case: Case, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """dH [T, D] and dW [V_local, D] of one forward and backward."""
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    side(hidden, weight).backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


def check_gradients(case: Case, sides: dict[str, Side], gated: Sequence[str]) -> dict[str, float]:
    """The largest difference of each side from the first of its kind, as a share of the largest entry.

    Raises:
        AssertionError: a side computes something else.
    """
    first = {True: "gated", False: "ungated"}
    expected = {is_gated: run_side(case, sides[name]) for is_gated, name in first.items()}
    errors = {}
    for name, side in sides.items():
        pairs = zip(run_side(case, side), expected[name in gated], strict=True)
        rows = case.shard.real
        errors[name] = max(
            float((mine[:rows] if k else mine).sub(other[:rows] if k else other).abs().max() / other.abs().max())
            for k, (mine, other) in enumerate(pairs)
        )
        assert errors[name] <= GRADIENT_TOLERANCE[case.hidden.dtype], f"{name} differs by {errors[name]:.1e}"
    return errors


def peak_extra_bytes(case: Case, side: Side) -> int | None:
    """Peak memory of one forward and backward beyond its inputs and its two gradients; None where it can't be told."""
    gradients = sum(tensor.numel() * tensor.element_size() for tensor in (case.hidden, case.weight))
    gc.collect()
    if case.hidden.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_side(case, side)
        return max(0, torch.cuda.max_memory_allocated() - before - gradients)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    run_side(case, side)
    return max(0, _status_bytes("VmHWM") - before - gradients)


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def time_interleaved(case: Case, sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round; the order turns from round to round. One round warms up."""
    calls: dict[str, Callable[[], Any]] = {name: partial(run_side, case, side) for name, side in sides.items()}
    calls["three matmuls"] = bare_matmuls(case)
    names, seconds = list(calls), {name: list[float]() for name in calls}
    on_gpu = case.hidden.device.type == "cuda"
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if case.shard.world_size > 1:
                dist.barrier(group=case.shard.group)
            if on_gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            calls[name]()
            if on_gpu:
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> dict[str, float]:
    """Median and quartiles, over rounds, of the time of ``name`` over that of ``base``."""
    ratios = [one / other for one, other in zip(seconds[name], seconds[base], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def benchmark(
    size: tuple[int, int, int],
    rounds: int,
    dtype: torch.dtype,
    device: str,
    shard: VocabShard,
    only: Sequence[str] | None = None,
) -> dict[str, Any]:
    """One size: gradients compared, memory, then times. ``only``: words in the names of sides beside ours."""
    case = make_case(*size, dtype, device, shard)
    sides, gated = sides_of(case)
    ours = ("gated", "ungated")
    sides = {n: side for n, side in sides.items() if only is None or n in ours or any(word in n for word in only)}
    errors = check_gradients(case, sides, gated)
    memory = {name: peak_extra_bytes(case, side) for name, side in sides.items()}
    seconds = time_interleaved(case, sides, rounds)
    return {
        "vocab_size": size[0],
        "hidden_size": size[1],
        "tokens": size[2],
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_parallel": shard.world_size,
        "rounds": rounds,
        "sides": {
            name: {
                "median_seconds": statistics.median(values),
                "over_gated": ratio(seconds, name, "gated"),
                "over_ungated": ratio(seconds, name, "ungated"),
                "over_three_matmuls": ratio(seconds, name, "three matmuls"),
                "peak_extra_bytes": memory.get(name),
                "gradient_difference": errors.get(name),
            }
            for name, values in seconds.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """One size as text: medians, and ratios with their quartiles."""
    head = f"V {result['vocab_size']:,}  D {result['hidden_size']:,}  T {result['tokens']:,}  {result['dtype']}"
    lines = [f"{head}  tensor-parallel {result['tensor_parallel']}, {result['rounds']} rounds"]
    lines.append(f"  {'':36}{'median':>11}{'/ three matmuls':>22}{'/ ungated':>22}{'peak extra':>13}")
    for name, side in result["sides"].items():
        cells = [f"{side['median_seconds'] * 1e3:,.1f} ms".rjust(11)]
        for key in ("over_three_matmuls", "over_ungated"):
            spread = side[key]
            cells.append(f"{spread['median']:.3f} [{spread['low']:.2f} {spread['high']:.2f}]".rjust(22))
        peak = side["peak_extra_bytes"]
        cells.append(("" if peak is None else f"{peak / 2**20:,.0f} MiB").rjust(13))
        lines.append(f"  {name:36}" + "".join(cells))
    return "\n".join(lines)


def default_sizes(device: str) -> list[tuple[int, int, int]]:
    if device == "cuda":
        return [(32_768, 1024, 8192), (50_257, 1024, 8192), (131_072, 4096, 8192)]
    return [(32_768, 256, 2048), (32_768, 256, 4096), (50_257, 256, 8192)]


def _size(text: str) -> tuple[int, int, int]:
    vocab_size, hidden_size, tokens = (int(part) for part in text.lower().split("x"))
    return vocab_size, hidden_size, tokens


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    if not torch.cuda.is_available() and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    try:
        here = Path(__file__).parent
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=here, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "hardware": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m agg.benchmark", description="What gating costs.")
    parser.add_argument("--sizes", nargs="+", type=_size, metavar="VxDxT", help="e.g. 50257x256x8192")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tensor-parallel", type=int, default=1, help="local ranks that share the vocabulary")
    parser.add_argument("--sides", nargs="*", metavar="WORD", help="only peers whose name holds one of these words")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the figures as JSON")
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.tensor_parallel < 1:
        parser.error("--rounds must be at least 2 and --tensor-parallel at least 1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    sizes = options.sizes or default_sizes(device)
    if options.tensor_parallel == 1:
        results = [
            benchmark(size, options.rounds, dtype, device, VocabShard(0, size[0], size[0]), options.sides)
            for size in sizes
        ]
    else:
        results = _on_ranks(options.tensor_parallel, sizes, options.rounds, dtype, device, options.sides)
    for result in results:
        print(table(result))
    if options.output is not None:
        options.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
    return 0


def _on_ranks(
    world_size: int,
    sizes: Sequence[tuple[int, int, int]],
    rounds: int,
    dtype: torch.dtype,
    device: str,
    only: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """The same on local ranks, each with its share of the vocabulary; the figures of the first."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(  # type: ignore[attr-defined,no-untyped-call]
            _rank, (world_size, sizes, rounds, dtype, device, only, folder), nprocs=world_size
        )
        results: list[dict[str, Any]] = json.loads((Path(folder) / "results.json").read_text())
        return results


def _rank(
    rank: int,
    world_size: int,
    sizes: Sequence[tuple[int, int, int]],
    rounds: int,
    dtype: torch.dtype,
    device: str,
    only: Sequence[str] | None,
    folder: str,
) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/world", rank=rank, world_size=world_size)
    results = []
    for size in sizes:
        shard = VocabShard.of_rank(size[0], rank, world_size, dist.group.WORLD, multiple_of=world_size)
        results.append(benchmark(size, rounds, dtype, device, shard, only))
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
