"""What is saved in the background is what was there when it was saved."""

from __future__ import annotations

import time

import pytest

from pretrain.checkpointing.folder import read_manifest
from pretrain.run_folder import RunFolder
from tests.distributed import run_ranks
from tests.small_runs import change, on_ranks, read_metrics, train_rank


def slow_rank(rank, world_size, recipe):
    """Files take long to write, so that steps are trained meanwhile."""
    from pretrain.checkpointing.files import CheckpointFiles

    write = CheckpointFiles._write

    def slowly(self, path, content):
        time.sleep(0.3)
        write(self, path, content)

    CheckpointFiles._write = slowly
    train_rank(rank, world_size, recipe)


@pytest.mark.parametrize(("sharding", "precision"), [("zero0", "fp32"), ("zero1", "bf16"), ("zero3", "fp32")])
def test_background_saves_the_same_bytes(prepared_recipe, tmp_path, sharding, precision):
    hashes, records = {}, {}
    for background in (True, False):
        recipe = change(
            prepared_recipe,
            output_root=str(tmp_path / str(background)),
            precision=precision,
            batch={"train_steps": 9},
            parallel={"sharding": sharding, "data_parallel_size": 2},
            checkpoint={"every_steps": 3, "background": background},
            reporting={"geometry_every_steps": 0, "validate_every_steps": 0},
        )
        run_ranks(slow_rank, 2, on_ranks(recipe, 2))
        checkpoints = RunFolder(recipe.run_folder).checkpoints
        hashes[background] = [read_manifest(checkpoints / f"step_0000000{step}")["files"] for step in (6, 9)]
        records[background] = read_metrics(recipe)
    assert hashes[True] == hashes[False] and len(hashes[True][0]) >= 3
    for background, recorded in records.items():
        first = next(record for record in recorded if "checkpoint_disk_seconds" in record)
        blocked, disk = first["checkpoint_blocked_seconds"], first["checkpoint_disk_seconds"]
        assert disk > 0.6 and (disk - blocked > 0.3) == background
