"""The benchmark: what it compares, that it sees a side that computes something else, what it prints and saves."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
import torch.distributed as dist

import agg.benchmark as benchmark
from agg import (
    VocabShard,
    benchmark_checks,
    benchmark_limits,
    benchmark_report,
    benchmark_sides,
    reference_gated_cross_entropy,
)
from agg.benchmark_counting import counting_calls
from agg.benchmark_sides import OURS
from tests.distributed import run_ranks

SIZE = (515, 8, 64)  # V does not divide over two ranks
PEERS = {"megatron-core vocab-parallel", "torch cross_entropy", "paper's form"}
PEERS |= {"torch linear_cross_entropy", "torch linear_cross_entropy, chunked"}
COUNTING = {"counting and gating, alpha", "counting and gating, rare_fraction"}


def whole(dtype=torch.float32):
    return benchmark.make_case(*SIZE, dtype, "cpu", VocabShard(0, SIZE[0], SIZE[0]))


def run(capsys, tmp_path, *arguments: str):
    output = tmp_path / "figures.json"
    sizes = [] if "--grid" in arguments else ["--sizes", "515x8x64"]
    assert benchmark.main([*sizes, "--rounds", "2", "--output", str(output), *arguments]) == 0
    return capsys.readouterr().out, json.loads(output.read_text())


def small_result(**changes):
    """As it is saved: gated takes 1.02 times ungated, the paper's form five times as long and ten times the memory."""
    seconds = {
        "gated": [1.03, 1.02, 1.02, 1.03, 1.02, 1.02, 1.03, 1.02, 1.0],
        "ungated": [1.0] * 9,
        "three matmuls": [0.9] * 9,
        "torch cross_entropy": [1.3] * 9,
        "paper's form": [5.0] * 9,
    }
    peaks = {"gated": 100, "ungated": 100, "paper's form": 1000}
    result = benchmark._empty_result((50_257, 256, 8192), 9, torch.float32, "cpu", 1)
    result["sides"] = {name: benchmark._figures(seconds, name, peaks, None) for name in seconds}
    return {**result, **changes}


def test_one_process(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(["--sizes", "515x8x64", "--rounds", "2"]) == 0
    text, saved = capsys.readouterr().out, json.loads((tmp_path / "agg-benchmark.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["agg-benchmark.json"]  # nothing half-written beside it
    assert str(tmp_path / "agg-benchmark.json") in text and not dist.is_initialized()
    (result,) = saved["results"]
    sides = result["sides"]
    assert {*OURS, "three matmuls", *PEERS, *COUNTING} <= set(sides)
    for name, side in sides.items():
        assert name in text and len(side["seconds"]) == 2 and side["failed"] is None
        assert side["over_gated"]["low"] <= side["over_gated"]["median"] <= side["over_gated"]["high"]
        assert (side["gradient_difference"] is None) == (name in COUNTING or name == "three matmuls")
        assert (side["peak_extra_bytes"] is None) == (name in COUNTING)
    assert sides["gated"]["over_gated"]["median"] == 1.0 and "/ gated" in text
    assert saved["targets"][0]["target"] == "gated / ungated <= 1.01" and saved["targets"][0]["verdict"] in text
    machine = saved["machine"]
    assert {"threads", "blas", "memory_bytes", "load_average_at_start", "quiet_at_start", "date"} <= set(machine)
    assert (
        machine["hardware"] in text and machine["commit"] in text and isinstance(machine["uncommitted_changes"], bool)
    )


def test_tensor_parallel(capsys, tmp_path):
    text, saved = run(capsys, tmp_path, "--tensor-parallel", "1", "2", "--sides", "megatron")
    one, two = saved["results"]
    assert (one["tensor_parallel"], two["tensor_parallel"]) == (1, 2) and "tensor-parallel 2" in text
    for result in (one, two):
        assert set(result["sides"]) == {*OURS, "megatron-core vocab-parallel", "three matmuls", *COUNTING}
        assert all(side["failed"] is None for side in result["sides"].values())


def forget_gates(case):
    """Our sides, the gated one of which is the ungated one."""
    sides, gated = benchmark.sides_of(case)
    return {"gated": sides["ungated"], "ungated": sides["ungated"]}, gated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forgotten_gates_are_refused(dtype):
    with pytest.raises(AssertionError, match="gated: row of dW off by .*; rare rows of dW off by"):
        benchmark.check_gradients(whole(dtype), *forget_gates(whole(dtype)))


def _on_a_shard(rank, world_size, dtype):
    shard = VocabShard.of_rank(SIZE[0], rank, world_size, dist.group.WORLD, multiple_of=world_size)
    case = benchmark.make_case(*SIZE, dtype, "cpu", shard)
    assert case.gates.rare_ids is not None  # or each call would ask the other ranks, which the module's don't
    checks = benchmark.check_gradients(case, *benchmark.sides_of(case))
    assert all(check.failure is None for check in checks.values()) and "megatron-core vocab-parallel" in checks
    with pytest.raises(AssertionError, match="gated: row of dW off by"):  # on both, also on the one without rare ids
        benchmark.check_gradients(case, *forget_gates(case))
    shifted = dataclasses.replace(case, weight=case.weight.roll(1, 0))
    with pytest.raises(AssertionError, match="off by"):
        benchmark.check_gradients(shifted, *benchmark.sides_of(shifted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forgotten_gates_are_refused_on_shards(dtype):
    run_ranks(_on_a_shard, 2, dtype)


def test_the_dense_answer_is_the_papers(monkeypatch):
    case = whole(torch.float64)
    monkeypatch.setattr(benchmark_checks, "CHUNK_TOKENS", 24)
    ids = benchmark_checks.rows_to_compare(SIZE[0], case.hidden.device)
    assert ids.tolist() == list(range(SIZE[0]))
    answers = benchmark_checks.dense_gradients(case, ids)
    for gates in (None, case.gates):
        side = lambda h, w, gates=gates: reference_gated_cross_entropy(h, w, case.target, gates)  # noqa: E731
        for mine, papers in zip(answers[gates is not None], benchmark.run_side(case, side), strict=True):
            torch.testing.assert_close(mine, papers, rtol=1e-9, atol=1e-15)


def test_other_libraries_may_fail(capsys, tmp_path, monkeypatch):
    sides_of = benchmark.sides_of

    def with_bad_ones(case):
        sides, gated = sides_of(case)
        sides = {name: sides[name] for name in OURS}
        off, broken = lambda h, w: 1.01 * sides["ungated"](h, w), lambda h, w: [][1]
        return {**sides, "off": off, "broken": broken, "torch cross_entropy": broken}, gated

    monkeypatch.setattr(benchmark, "sides_of", with_bad_ones)
    text, saved = run(capsys, tmp_path)
    (result,) = saved["results"]
    assert result["sides"]["off"]["failed"].startswith("row of dH off by 1.0e-02, budget ")
    assert "off (!)" in text and f"(!) off: {result['sides']['off']['failed']}" in text
    assert result["not_timed"]["broken"] == "IndexError: list index out of range" and "broken" not in result["sides"]
    assert "not timed: broken: IndexError" in text


def test_peers_of_a_gpu_that_are_not_installed(capsys, tmp_path, monkeypatch):
    for name in ("liger_kernel", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, name, None)
    sides_of = benchmark.sides_of

    def as_on_a_gpu(case):
        sides, gated = sides_of(case)
        return sides | benchmark_sides._gpu_sides(case.target, torch.bfloat16), gated

    monkeypatch.setattr(benchmark, "sides_of", as_on_a_gpu)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
    text, saved = run(capsys, tmp_path, "--sides", "Liger", "Cut", "torch")
    (result,) = saved["results"]
    reasons = result["not_timed"]
    assert (
        reasons["Liger fused linear"] == reasons["Liger fused linear, float32 sums"] == "liger_kernel is not installed"
    )
    assert reasons["Cut Cross-Entropy, filter_eps=None"] == "cut_cross_entropy is not installed" and len(reasons) == 6
    assert reasons["torch linear_cross_entropy, chunked"] == f"torch {torch.__version__} has none"
    assert "not timed: Cut Cross-Entropy: cut_cross_entropy is not installed" in text
    assert set(result["sides"]) == {*OURS, "torch cross_entropy", "three matmuls", *COUNTING}


def test_a_wrong_side_of_ours_costs_its_size_only(capsys, tmp_path, monkeypatch):
    check = benchmark.check_gradients

    def wrong_at_64_tokens(case, sides, gated):
        return check(case, *(forget_gates(case) if len(case.target) == 64 else (sides, gated)))

    monkeypatch.setattr(benchmark, "check_gradients", wrong_at_64_tokens)
    output = tmp_path / "it.json"
    sizes = ["--sizes", "515x8x64", "515x8x65", "--sides", "--rounds", "2"]
    assert benchmark.main([*sizes, "--output", str(output)]) == 1
    first, second = json.loads(output.read_text())["results"]
    assert "gated: row of dW off by" in first["failed"] and not first["sides"]
    assert second["failed"] is None and second["sides"]
    assert "FAILED, AssertionError: gated: row of dW off by" in capsys.readouterr().out


def test_both_times_of_a_gpu_are_told():
    result = {**small_result(), "device": "cuda"}
    seconds = {name: side["seconds"] for name, side in result["sides"].items()}
    idle = {name: [2 * second for second in times] for name, times in seconds.items()}
    result["sides"] = {name: benchmark._figures(seconds, name, {}, None, idle) for name in seconds}
    assert result["sides"]["gated"]["from_idle"]["median_seconds"] == 2.04
    first, heads, gated, *_ = benchmark.table(result).splitlines()
    assert "from idle to idle" in first and heads.endswith("from idle") and gated.endswith("2,040.00 ms")
    assert "from idle" not in benchmark.table(small_result())


def test_counting_leaves_the_window_full():
    call = counting_calls(whole())["counting and gating, rare_fraction"]
    (gating,) = (cell.cell_contents for cell in call.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    before = gating.frequency.appearances.clone()
    call()
    assert gating.frequency.steps == gating.frequency.window_steps and gating.frequency.tokens == 8 * SIZE[2]
    assert not torch.equal(before, gating.frequency.appearances)


def test_what_does_not_fit_is_left_out(capsys, tmp_path, monkeypatch):
    shard = VocabShard(0, SIZE[0], SIZE[0])
    base = benchmark_limits.base_bytes(SIZE, torch.float32, "cpu", shard)
    some = base + benchmark_limits.side_bytes("torch cross_entropy", SIZE, shard)
    monkeypatch.setattr(benchmark_limits, "available_bytes", lambda device, shard: int(some / 0.9) + 1)
    text, saved = run(capsys, tmp_path, "--sides", "cross_entropy", "paper")
    (result,) = saved["results"]
    assert "torch cross_entropy" in result["sides"] and "paper's form" not in result["sides"]
    assert result["not_timed"]["paper's form"].startswith("needs ") and "not timed: paper's form: needs" in text
    monkeypatch.setattr(benchmark_limits, "available_bytes", lambda device, shard: base)
    text, saved = run(capsys, tmp_path)
    assert saved["results"][0]["skipped"].startswith("needs ") and "skipped, needs" in text
    assert not saved["results"][0]["sides"] and "none is stated" in text


def test_grid_and_time_limit(capsys, tmp_path, monkeypatch):
    grid = benchmark_limits.grid_sizes()
    assert {32_768, 50_257, 131_072} == {v for v, _, _ in grid} and {256, 1024, 4096} == {d for _, d, _ in grid}
    assert len(set(grid)) == 3 * 3 * 2 + 1 and {t for *_, t in grid} == {2048, 4096, 8192}
    monkeypatch.setattr(benchmark_limits, "grid_sizes", lambda: [SIZE, (1030, 8, 64)])
    text, saved = run(capsys, tmp_path, "--grid", "--tensor-parallel", "1", "--limit-seconds", "1e-6")
    assert [result["vocab_size"] for result in saved["results"]] == [515, 1030]
    assert text.count("skipped, would take about") == 2


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    def second_is_interrupted(size, *rest):
        if size[0] != 515:
            raise KeyboardInterrupt
        return small_result()

    monkeypatch.setattr(benchmark, "benchmark", second_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(["--sizes", "515x8x64", "1030x8x64", "--output", str(tmp_path / "it.json")])
    assert len(json.loads((tmp_path / "it.json").read_text())["results"]) == 1


def test_targets():
    verdicts = {v["target"]: v for v in benchmark_report.judge([small_result()])}
    assert verdicts["gated / ungated <= 1.01"]["verdict"] == "missed"
    assert verdicts["gated / torch cross_entropy <= 0.90"]["verdict"] == "met"
    assert verdicts["paper's form / gated >= 4.00"]["verdict"] == "met"
    assert verdicts["peak memory of paper's form / gated >= 8.00"]["measured"] == 10
    assert not any("three matmuls" in target for target in verdicts)  # of another size
    few = small_result(rounds=8)
    for side in few["sides"].values():
        side["seconds"] = side["seconds"][:8]
    times = {v["verdict"] for v in benchmark_report.judge([few]) if "memory" not in v["target"]}
    assert times == {"too few rounds"}
    noisy = small_result()
    noisy["sides"]["gated"]["seconds"][:2] = [0.9, 0.95]
    assert benchmark_report.judge([noisy])[0]["verdict"] == "within spread"
    here = small_result(vocab_size=32_768, tokens=4096)
    assert [v["verdict"] for v in benchmark_report.judge([here]) if "three" in v["target"]] == ["met"]
    assert "missed" in benchmark_report.targets_table(list(verdicts.values()))


def test_bad_options(capsys, tmp_path):
    outputs = (["--sizes", "64x8x16", "--output", str(output)] for output in (tmp_path / "no" / "file", tmp_path))
    for arguments in (["--rounds", "1"], ["--tensor-parallel", "0"], *outputs):
        with pytest.raises(SystemExit) as stop:
            benchmark.main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()
    for size in ("515x8", "515x8x-1", "515x8x0", "ax8x64"):
        with pytest.raises(SystemExit) as stop:
            benchmark.main(["--sizes", size])
        assert stop.value.code == 2
        assert f"'{size}' is no size VxDxT, such as 50257x256x8192" in capsys.readouterr().err
