"""What is saved in the background is what was there when it was saved."""

from __future__ import annotations

import time

import pytest

from pretrain.checkpointing import folder as folder_module
from pretrain.checkpointing.folder import (
    checkpoint_name,
    checkpoints_in,
    delete_old,
    problems_of,
    read_manifest,
    write_manifest,
)
from pretrain.files import file_sha256
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


def test_what_is_looked_at_to_delete_old_checkpoints(tmp_path, monkeypatch):
    """Not all that are kept for ever; damaged ones do not count."""
    steps = range(10, 110, 10)
    for step in steps:
        (tmp_path / checkpoint_name(step)).mkdir()
        if step != 90:
            write_manifest(tmp_path / checkpoint_name(step), {"files": {}})
    looked_at, problems_of = [], folder_module.problems_of

    def counted(checkpoint, **options):
        looked_at.append(folder_module.step_of(checkpoint))
        return problems_of(checkpoint, **options)

    monkeypatch.setattr(folder_module, "problems_of", counted)
    delete_old(tmp_path, 100, keep_last=2, keep_every_steps=20)
    assert looked_at == [100, 90, 80, 70]
    assert [folder_module.step_of(path) for path in checkpoints_in(tmp_path)] == [100, 90, 80, 60, 40, 20]


@pytest.mark.parametrize("damage", ["none", "missing", "truncated", "flipped", "another"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
def test_ranks_share_the_look_at_a_checkpoint(tmp_path, monkeypatch, damage, ranks):
    """Together they find what one finds, and each file is looked at once."""
    files = {f"{letter}.pt": letter.encode() * 10 for letter in "abcdefg"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    entries = {name: {"bytes": 10, "sha256": file_sha256(tmp_path / name)} for name in files}
    write_manifest(tmp_path, {"files": entries})
    harm = {"truncated": b"eeee", "flipped": b"eeeeeeeeef"}
    if damage == "missing":
        (tmp_path / "e.pt").unlink()
    elif damage != "none":
        (tmp_path / ("x.pt" if damage == "another" else "e.pt")).write_bytes(harm.get(damage, b""))
    alone = problems_of(tmp_path)
    assert len(alone) == (damage != "none")
    looked_at, size_problem = [], folder_module._size_problem
    monkeypatch.setattr(
        folder_module, "_size_problem", lambda *given: looked_at.append(given[1]) or size_problem(*given)
    )
    shares = [problems_of(tmp_path, share=slice(rank, None, ranks)) for rank in range(ranks)]
    assert [problem for found in shares for problem in found] == alone
    assert sorted(looked_at) == sorted(files)
