"""``python -m agg.benchmark``: what gating costs, against the plain loss, three bare matmuls, and peers.

All sides run in every round of one process, in an order drawn anew, so a ratio is taken within a round, and its median,
quartiles and confidence interval over rounds; absolute times of a shared machine mean little. On a GPU its own time
counts, behind other work, and beside it stands the time from idle to idle. Gradients are compared before anything is
timed. A side of another library that computes something else is timed and marked; of a size where one of ours does,
nothing is timed, and the exit code is 1. The figures are saved as JSON after each size, whole or not at all.

    python -m agg.benchmark                                   # a few sizes
    python -m agg.benchmark --grid --limit-seconds 600        # all sizes that this machine has memory and time for
    python -m agg.benchmark --sizes 50257x256x8192 --rounds 9 --output result.json
    python -m agg.benchmark --tensor-parallel 1 2             # also two local ranks, half of the vocabulary each
    python -m agg.benchmark --sides torch                     # beside ours only the sides of torch

Letters in sizes: V x D x T, vocabulary, hidden size, tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.multiprocessing.spawn import ProcessRaisedException

from agg import benchmark_limits as limits
from agg.benchmark_checks import Check, check_gradients
from agg.benchmark_counting import counting_calls
from agg.benchmark_limits import Size
from agg.benchmark_measure import peak_extra_bytes, ratio, time_interleaved
from agg.benchmark_report import Result, describe_machine, judge, machine_line, save, table, targets_table
from agg.benchmark_sides import (
    BACKENDS,
    OURS,
    bare_matmuls,
    make_case,
    missing_library,
    run_side,
    sides_of,
    world_of_one,
)
from agg.vocab_shard import VocabShard


def benchmark(
    size: Size,
    rounds: int,
    dtype: torch.dtype,
    device: str,
    shard: VocabShard,
    only: Sequence[str] | None = None,
    limit_seconds: float | None = None,
) -> Result:
    """One size: what fits, gradients compared, memory, then times.

    Args:
        only: words in the names of sides beside ours.
        limit_seconds: a size that would take longer is skipped.
    """
    result = _empty_result(size, rounds, dtype, device, shard.world_size)
    available, needed = limits.available_bytes(device, shard), limits.base_bytes(size, dtype, device, shard)
    result["skipped"] = limits.beyond_memory(needed, available)
    if result["skipped"]:
        return result
    with world_of_one(device):
        case = make_case(*size, dtype, device, shard)
        sides, gated = sides_of(case)
        sides = {n: side for n, side in sides.items() if only is None or n in OURS or any(word in n for word in only)}
        for name in list(sides):
            reason = missing_library(name)
            reason = reason or limits.beyond_memory(needed + limits.side_bytes(name, size, shard), available)
            if reason and name not in OURS:
                result["not_timed"][name] = reason
                del sides[name]
        result["skipped"] = limits.beyond_time(case, len(sides), rounds, limit_seconds)
        if result["skipped"]:
            return result
        checks = check_gradients(case, sides, gated)
        result["not_timed"] |= {name: str(check.failure) for name, check in checks.items() if not check.differences}
        sides = {name: side for name, side in sides.items() if checks[name].differences}
        memory = {name: peak_extra_bytes(case, partial(run_side, case, side)) for name, side in sides.items()}
        memory["three matmuls"] = peak_extra_bytes(case, lambda: bare_matmuls(case)())
        others = counting_calls(case)
        seconds = time_interleaved(case, sides, rounds, memory, others)
        from_idle = None
        if device == "cuda":
            from_idle = time_interleaved(case, sides, rounds, memory, others, from_idle=True)
    result["sides"] = {name: _figures(seconds, name, memory, checks.get(name), from_idle) for name in seconds}
    return result


def _empty_result(size: Size, rounds: int, dtype: torch.dtype, device: str, tensor_parallel: int) -> Result:
    return {
        "vocab_size": size[0],
        "hidden_size": size[1],
        "tokens": size[2],
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "tensor_parallel": tensor_parallel,
        "threads": torch.get_num_threads(),  # of each rank
        "rounds": rounds,
        "skipped": None,  # or why nothing was measured
        "failed": None,  # or which side of ours computes something else
        "not_timed": {},  # side: why
        "sides": {},
    }


def _figures(
    seconds: dict[str, list[float]],
    name: str,
    memory: dict[str, int | None],
    check: Check | None,
    from_idle: dict[str, list[float]] | None = None,
) -> dict[str, Any]:
    """``from_idle``: on a GPU, where the launches of the host count too."""
    return {
        **_times(seconds, name),
        "from_idle": from_idle and _times(from_idle, name),
        "peak_extra_bytes": memory.get(name),
        "gradient_difference": check and check.differences,
        "failed": check and check.failure,
    }


def _times(seconds: dict[str, list[float]], name: str) -> dict[str, Any]:
    return {
        "median_seconds": statistics.median(seconds[name]),
        "over_gated": ratio(seconds, name, "gated"),
        "over_ungated": ratio(seconds, name, "ungated"),
        "over_three_matmuls": ratio(seconds, name, "three matmuls"),
        "seconds": seconds[name],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    machine, results = describe_machine(), list[Result]()
    print(machine_line(machine))
    for degree in options.tensor_parallel:
        for size in options.sizes:
            results.append(_one_size(degree, size, options))
            print(table(results[-1]), flush=True)
            save(options.output, machine, results)  # after each, so that an interrupted run keeps what it has
    print(targets_table(judge(results)))
    print(f"saved in {options.output.resolve()}")
    return int(any(result["failed"] for result in results))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m agg.benchmark", description="What gating costs.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sizes", nargs="+", type=limits.size_of, metavar="VxDxT", help="e.g. 50257x256x8192")
    which.add_argument(
        "--grid", action="store_true", help="V 32k 50k 128k x D 256 1024 4096 x T 2k 8k, small ones first"
    )
    parser.add_argument("--limit-seconds", type=float, metavar="N", help="skip sizes that would take longer than this")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--tensor-parallel", type=int, nargs="+", metavar="N",
        help="local ranks that share the vocabulary, one or more degrees; default: 1, with --grid also 2 if there are "
        "as many devices",
    )  # fmt: skip
    parser.add_argument("--sides", nargs="*", metavar="WORD", help="only peers whose name holds one of these words")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--output", type=Path, metavar="FILE", default=Path("agg-benchmark.json"))
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    devices = torch.cuda.device_count() if options.device == "cuda" else os.cpu_count() or 1
    if options.tensor_parallel is None:
        options.tensor_parallel = [1, 2] if options.grid and devices >= 2 else [1]
    if options.rounds < 2 or min(options.tensor_parallel) < 1:
        parser.error("--rounds must be at least 2 and --tensor-parallel at least 1")
    if options.device == "cuda" and max(options.tensor_parallel) > devices:
        parser.error(f"--tensor-parallel {max(options.tensor_parallel)} needs as many GPUs, there are {devices}")
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.absolute().parent}")
    if options.output.is_dir():
        parser.error(f"--output: {options.output} is a folder, give a file")
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    options.sizes = options.sizes or (limits.grid_sizes() if options.grid else limits.default_sizes(options.device))
    return options


def _one_size(degree: int, size: Size, options: argparse.Namespace) -> Result:
    """On ``degree`` ranks; a GPU that runs out of memory after all, or a wrong gradient, costs this size only."""
    given = (size, options.rounds, options.dtype, options.device)
    try:
        if degree > 1:
            return _on_ranks(degree, *given, options.sides, options.limit_seconds)
        return benchmark(*given, VocabShard(0, size[0], size[0]), options.sides, options.limit_seconds)
    except (torch.OutOfMemoryError, AssertionError, ProcessRaisedException) as error:
        text = f"{type(error).__name__}: {error}"  # of a rank it holds the traceback, which ends with its error
        if "OutOfMemoryError" in text:
            return {**_empty_result(*given, degree), "skipped": "the GPU ran out of memory"}
        if "AssertionError" in text:
            return {**_empty_result(*given, degree), "failed": text.strip().splitlines()[-1]}
        raise


def _on_ranks(world_size: int, size: Size, *rest: Any) -> Result:
    """:func:`benchmark` on local ranks, each with its share of the vocabulary; the figures of the first."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the first rank's memory
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(  # type: ignore[attr-defined,no-untyped-call]
            _rank, (world_size, folder, size, *rest), nprocs=world_size
        )
        result: Result = json.loads((Path(folder) / "result.json").read_text())
        return result


def _rank(
    rank: int, world_size: int, folder: str, size: Size, rounds: int, dtype: torch.dtype, device: str, *rest: Any
) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    rendezvous = f"file://{folder}/world"
    dist.init_process_group(BACKENDS[device], init_method=rendezvous, rank=rank, world_size=world_size)
    shard = VocabShard.of_rank(size[0], rank, world_size, dist.group.WORLD, multiple_of=world_size)
    result = benchmark(size, rounds, dtype, device, shard, *rest)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
