"""What :mod:`agg.benchmark` prints and saves: a table of each size, the targets of this project, the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agg.benchmark_limits import host_bytes
from agg.benchmark_measure import ratio

Result = dict[str, Any]
LEAST_ROUNDS = 9  # of a median that is held against a target


def title(result: Result) -> str:
    size = f"V {result['vocab_size']:,}  D {result['hidden_size']:,}  T {result['tokens']:,}"
    return f"{size}  {result['dtype']}  {result['device']}  tensor-parallel {result['tensor_parallel']}"


def table(result: Result) -> str:
    """One size as text: medians, ratios with their quartiles, what failed or was left out."""
    if result["skipped"]:
        return f"{title(result)}: skipped, {result['skipped']}"
    if result["failed"]:
        return f"{title(result)}: FAILED, {result['failed']}"
    on_gpu = result["device"] == "cuda"
    told = "; medians of the GPU's own time behind other work, and from idle to idle" if on_gpu else ""
    lines = [f"{title(result)}, {result['rounds']} rounds, quartiles in brackets{told}"]
    lines.append(
        f"  {'':36}{'median':>13}{'/ three matmuls':>24}{'/ ungated':>24}{'/ gated':>24}{'peak extra':>12}"
        + ("from idle".rjust(13) if on_gpu else "")
    )
    for name, side in result["sides"].items():
        cells = [f"{side['median_seconds'] * 1e3:,.2f} ms".rjust(13)]
        for key in ("over_three_matmuls", "over_ungated", "over_gated"):
            digits = 3 if side[key]["median"] > 0.1 else 5
            quartiles = f"[{side[key]['low']:.{digits - 1}f} {side[key]['high']:.{digits - 1}f}]"
            cells.append(f"{side[key]['median']:.{digits}f} {quartiles}".rjust(24))
        peak = side["peak_extra_bytes"]
        cells.append(("" if peak is None else f"{peak / 2**20:,.0f} MiB").rjust(12))
        if on_gpu:
            cells.append(f"{side['from_idle']['median_seconds'] * 1e3:,.2f} ms".rjust(13))
        lines.append(f"  {name + (' (!)' if side['failed'] else ''):36}" + "".join(cells))
    lines += [f"  (!) {name}: {side['failed']}" for name, side in result["sides"].items() if side["failed"]]
    lines += [f"  not timed: {name}: {reason}" for name, reason in result["not_timed"].items()]
    return "\n".join(lines)


@dataclass(frozen=True)
class Target:
    """``name`` over ``base``, in time or in peak memory, is to be at most (or at least) ``limit``."""

    name: str
    base: str
    limit: float
    applies: Callable[[Result], bool]
    at_most: bool = True
    memory: bool = False

    def text(self) -> str:
        kind = "peak memory of " if self.memory else ""
        return f"{kind}{self.name} / {self.base} {'<=' if self.at_most else '>='} {self.limit:.2f}"


def _is(result: Result, device: str, size: tuple[int, int, int], dtype: str) -> bool:
    """Whether it is this size on one rank."""
    measured = tuple(result[key] for key in ("vocab_size", "hidden_size", "tokens", "device", "dtype"))
    return measured == (*size, device, dtype) and result["tensor_parallel"] == 1


TARGETS = (
    Target("gated", "ungated", 1.01, lambda result: True),
    Target("gated", "three matmuls", 1.20, lambda result: _is(result, "cpu", (32_768, 256, 4096), "float32")),
    Target("gated", "three matmuls", 1.25, lambda result: _is(result, "cuda", (131_072, 4096, 8192), "bfloat16")),
    Target("gated", "torch cross_entropy", 0.90, lambda result: result["device"] == "cpu"),
    Target("gated", "Liger fused linear", 1.00, lambda result: result["device"] == "cuda"),
    Target("gated", "Liger fused linear, float32 sums", 1.00, lambda result: result["device"] == "cuda"),
    Target("paper's form", "gated", 4, lambda r: (r["vocab_size"], r["tokens"]) == (50_257, 8192), at_most=False),
    Target("paper's form", "gated", 8, lambda r: (r["vocab_size"], r["tokens"]) == (50_257, 8192), False, memory=True),
)


def judge(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Each target against each size that it is stated for and both of whose sides were measured."""
    verdicts = []
    for target in TARGETS:
        for result in results:
            sides = result["sides"]
            if target.name in sides and target.base in sides and target.applies(result):
                measured, interval = _measured(target, sides)
                if measured is not None:
                    verdict = {
                        "target": target.text(),
                        "size": f"{title(result)}, {result['rounds']} rounds",
                        "measured": measured,
                    }
                    verdict["interval"] = interval
                    verdict["verdict"] = _verdict(target, measured, interval, result["rounds"])
                    failed = next((n for n in (target.name, target.base) if sides[n]["failed"]), None)
                    verdicts.append({**verdict, "note": failed and f"{failed} computes other gradients"})
    return verdicts


def _measured(target: Target, sides: dict[str, Any]) -> tuple[float | None, list[float] | None]:
    """The ratio and, of times, the interval of its median."""
    if target.memory:
        peak, base = (sides[name]["peak_extra_bytes"] for name in (target.name, target.base))
        return (peak / base if peak and base else None), None
    times = {name: sides[name]["seconds"] for name in (target.name, target.base)}
    found = ratio(times, target.name, target.base)
    return found["median"], [found["interval_low"], found["interval_high"]]


def _verdict(target: Target, measured: float, interval: list[float] | None, rounds: int) -> str:
    """``met`` by the median alone; ``within spread`` if it misses and the interval of the median holds the limit.

    A median of times counts from ``LEAST_ROUNDS`` on; with fewer the verdict is ``too few rounds``.
    """
    if interval is not None and rounds < LEAST_ROUNDS:
        return "too few rounds"
    if measured <= target.limit if target.at_most else measured >= target.limit:
        return "met"
    return "within spread" if interval and interval[0] <= target.limit <= interval[1] else "missed"


def targets_table(verdicts: Sequence[dict[str, Any]]) -> str:
    lines = [
        "targets: median of the ratio, in brackets where it lies with 95 % confidence (order statistics; of fewer than "
        "6 rounds all, which is less)"
    ]
    for verdict in verdicts:
        interval = verdict["interval"]
        spread = f" [{interval[0]:.3f} {interval[1]:.3f}]" if interval else ""
        note = f"; {verdict['note']}" if verdict["note"] else ""
        lines.append(f"  {verdict['target']:62}{verdict['measured']:8.3f}{spread:16}  {verdict['verdict']}{note}")
        lines.append(f"      {verdict['size']}")
    return "\n".join(lines if verdicts else [*lines, "  none is stated for the sizes and sides that were run"])


def save(file: Path, machine: dict[str, Any], results: Sequence[Result]) -> None:
    """As JSON, whole or not at all."""
    content = {"machine": machine, "targets": judge(results), "results": list(results)}
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


def describe_machine() -> dict[str, Any]:
    """What the figures are measured on, and whether it was quiet when they were begun."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    described: dict[str, Any] = {
        "hardware": _processor(),
        "memory_bytes": host_bytes("MemTotal"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "blas": _blas(),
        "load_average_at_start": load,
        "quiet_at_start": None if load is None else load <= 0.5,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        described["gpu"] = {"name": gpu.name, "memory_bytes": gpu.total_memory, "count": torch.cuda.device_count()}
        described["gpu"]["cuda"] = torch.version.cuda
    return described


def machine_line(machine: dict[str, Any]) -> str:
    gpu = f"{machine['gpu']['name']}, " if "gpu" in machine else ""
    load = machine["load_average_at_start"]
    quiet = (
        "load unknown" if load is None else f"load {load:.2f}, {'quiet' if machine['quiet_at_start'] else 'not quiet'}"
    )
    changed = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    return (
        f"{gpu}{machine['hardware']}, {machine['threads']} threads, {quiet}; torch {machine['torch']}, "
        f"commit {machine['commit']}{changed}, {machine['date']}"
    )


def _processor() -> str:
    """Its name, and the numbers that tell it where a virtual machine's name does not."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = told.get("model name") or platform.processor() or platform.machine()
    if "vendor_id" not in told:
        return name
    numbers = f"family {told.get('cpu family')} model {told.get('model')} stepping {told.get('stepping')}"
    return f"{name} ({told['vendor_id']} {numbers})"


def _blas() -> dict[str, Any]:
    """The library that multiplies matrices on the CPU, and the threads it may use."""
    library = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    told = torch.__config__.parallel_info()
    threads = re.search(r"mkl_get_max_threads\(\) : (\d+)", told) or re.search(r"omp_get_max_threads\(\) : (\d+)", told)
    return {"library": library and library[1], "threads": threads and int(threads[1])}


def _git(*arguments: str) -> str:
    try:
        return subprocess.check_output(
            ["git", *arguments], cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
