"""The benchmark runs all its sides, compares their gradients, and saves what it prints."""

from __future__ import annotations

import json

import pytest

import agg.benchmark as benchmark


def run(capsys, tmp_path, *arguments: str):
    output = tmp_path / "figures.json"
    assert benchmark.main(["--sizes", "514x8x64", "--rounds", "2", "--output", str(output), *arguments]) == 0
    return capsys.readouterr().out, json.loads(output.read_text())


def test_one_process(capsys, tmp_path):
    text, saved = run(capsys, tmp_path)
    (result,) = saved["results"]
    assert {"gated", "ungated", "three matmuls", "torch cross_entropy", "paper's form"} <= set(result["sides"])
    for name, side in result["sides"].items():
        assert name in text and side["median_seconds"] > 0
        assert side["over_gated"]["low"] <= side["over_gated"]["median"] <= side["over_gated"]["high"]
    assert result["sides"]["gated"]["over_gated"]["median"] == 1.0
    assert {"hardware", "torch", "date", "commit"} <= set(saved["machine"])


def test_tensor_parallel(capsys, tmp_path):
    text, saved = run(capsys, tmp_path, "--tensor-parallel", "2")
    assert saved["results"][0]["tensor_parallel"] == 2
    assert "megatron-core vocab-parallel" in saved["results"][0]["sides"] and "tensor-parallel 2" in text


def test_a_side_that_computes_something_else_is_not_timed(monkeypatch):
    sides_of = benchmark.sides_of

    def wrong(case):
        sides, gated = sides_of(case)
        return {**sides, "wrong": lambda h, w: 1.01 * sides["ungated"](h, w)}, gated

    monkeypatch.setattr(benchmark, "sides_of", wrong)
    with pytest.raises(AssertionError, match="wrong differs by 1"):
        benchmark.main(["--sizes", "514x8x64", "--rounds", "2"])


def test_bad_options():
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--rounds", "1"])
    assert stop.value.code == 2
