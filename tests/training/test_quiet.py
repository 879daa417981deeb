"""What a run prints is its own: DeepSpeed's wrapper around bf16 tells of memory, and of how it loads."""

from __future__ import annotations

import pytest

from pretrain.quiet import without_prints
from tests.small_runs import change, train_on_ranks


def variant(recipe, folder, steps):
    return change(
        recipe, name="quiet", output_root=str(folder), precision="bf16", batch={"train_steps": steps},
        parallel={"sharding": "zero1"},
    )  # fmt: skip


def test_a_run_in_bf16_and_its_resume(prepared_recipe, tmp_path, capfd):
    train_on_ranks(variant(prepared_recipe, tmp_path, 3), 1, stop_at_step=2)
    train_on_ranks(variant(prepared_recipe, tmp_path, 3), 1)
    told = capfd.readouterr().out
    assert "goes on from step 2" in told
    assert not [line for line in told.splitlines() if "optimizer" in line or line.startswith(("MA ", "_load"))]


def test_errors_come_through(capsys):
    with pytest.raises(ValueError, match="as it may be"), without_prints():
        print("begin optimizer")
        raise ValueError("as it may be")
    print("after")
    assert capsys.readouterr().out == "after\n"
