"""Disks that are full or read-only while a run saves: all ranks stop with the cause, and what was saved stays good."""

from __future__ import annotations

import ctypes
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.checkpointing.folder import checkpoints_in, problems_of
from pretrain.cluster.job import node_name
from pretrain.data.prepared import PreparedData
from pretrain.model.size import checkpoint_bytes
from pretrain.recipe import Recipe
from pretrain.recipe_io import recipe_to_dict
from pretrain.run_folder import RunFolder
from tests.distributed import run_ranks
from tests.faults.harness import exact, resume_rank, same_state
from tests.small_runs import change, on_ranks, train_on_ranks

ROOT = Path(__file__).resolve().parents[2]
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def limited_rank(rank: int, world_size: int, recipe: Recipe, limited: int) -> str:
    """Train to the end; on one rank the kernel refuses files above 20 kB."""
    if rank == limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return resume_rank(rank, world_size, recipe)


@pytest.fixture(scope="module")
def calm(prepared_recipe, tmp_path_factory):
    """Six steps on two ranks, undisturbed."""
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path_factory.mktemp("calm")),
        checkpoint={"every_steps": 2, "keep_last": 1},
        parallel={"data_parallel_size": 2},
        reporting={"geometry_every_steps": 0, "validate_every_steps": 0},
    )
    train_on_ranks(recipe, 2)
    return recipe


@pytest.fixture
def begun(calm, tmp_path):
    """The same, stopped after the first checkpoint."""
    recipe = change(calm, output_root=str(tmp_path))
    train_on_ranks(recipe, 2, stop_at_step=2)
    return recipe


@pytest.mark.parametrize(("limited", "background"), [(0, True), (1, True), (1, False)])
def test_one_rank_cannot_write(calm, begun, limited, background):
    recipe = on_ranks(change(begun, checkpoint={"background": background}), 2)
    messages = run_ranks(limited_rank, 2, recipe, limited)
    checkpoints = RunFolder(recipe.run_folder).checkpoints
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"cannot save the checkpoint step_00000004: {checkpoints / 'tmp_step_00000004_'}")
    assert f"File too large (rank {limited} on {node_name()})" in messages[0]
    assert messages[0].endswith("give the same command again, without --from-scratch or --resume-from")
    assert [path.name for path in checkpoints.iterdir() if path.is_dir()] == ["step_00000002"]
    assert problems_of(checkpoints / "step_00000002") == []
    assert run_ranks(resume_rank, 2, recipe) == ["", ""]
    assert exact(recipe) == exact(calm) and same_state(calm, recipe, 6) == []


def train_command(recipe: Recipe, folder: Path) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(recipe)), encoding="utf-8")
    return [sys.executable, "-m", "pretrain", "train", str(path)]


def test_full_disk(calm, begun, tmp_path):
    """A small file system of its own where the kernel lets us mount one; a limit on file sizes where it does not.

    It has room for the weights and Adam's state, so the run starts, but not for all that a checkpoint holds.
    """
    folder = Path(begun.run_folder)
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    whole = sum(size for path, size in sizes.items() if path.parent.name == "step_00000002")
    formula = checkpoint_bytes(begun.model, PreparedData.open(begun).vocab_size, begun.precision)
    room = sum(4096 * math.ceil(size / 4096) for size in sizes.values()) + 0.3 * formula + 0.7 * whole
    assert whole > 1.05 * formula
    script = f"""
        mount -t tmpfs -o size={int(room)} none "$1" 2>/dev/null || exit 77
        cp -a "$2"/. "$1"; shift 2; "$@"; code=$?
        cp -a {folder}/. {tmp_path}/after; exit $code
    """
    command = train_command(begun, tmp_path)
    (tmp_path / "before").mkdir()
    (tmp_path / "after").mkdir()
    subprocess.run(["cp", "-a", f"{folder}/.", str(tmp_path / "before")], check=True)
    inside = ["unshare", "-rm", "sh", "-c", script, "sh", str(folder), str(tmp_path / "before"), *command]
    done = subprocess.run(inside, cwd=ROOT, capture_output=True, text=True, timeout=240)
    cause = "No space left on device"
    if not list((tmp_path / "after").iterdir()):  # not permitted here
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=240,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)),
        )  # fmt: skip
        cause = "File too large"
        subprocess.run(["cp", "-a", f"{folder}/.", str(tmp_path / "after")], check=True)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"cannot save the checkpoint step_00000004: {folder}/checkpoints/tmp_step_00000004_" in done.stderr
    assert cause in done.stderr
    left = [path for path in (tmp_path / "after" / "checkpoints").iterdir() if path.is_dir()]
    assert [path.name for path in left] == ["step_00000002"] and problems_of(left[0]) == []
    assert run_ranks(resume_rank, 2, begun) == ["", ""]
    assert exact(begun) == exact(calm) and same_state(calm, begun, 6) == []


def bound_by_permissions() -> None:
    """What is read-only is so for root too: programs started from here cannot override permission bits."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def test_read_only_folders(begun, tmp_path):
    folder = RunFolder(begun.run_folder)
    command = train_command(begun, tmp_path)
    for read_only, part in (
        (folder.path, f"the folder {folder.path} is not writable"),
        (folder.checkpoints, f"cannot save the checkpoint step_00000004: {folder.checkpoints}/tmp_step_00000004_"),
    ):
        os.chmod(read_only, 0o555)
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=240, preexec_fn=bound_by_permissions
        )
        os.chmod(read_only, 0o755)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert done.stderr.count("error: ") == 1 and part in done.stderr
    assert "Permission denied" in done.stderr
    assert [path.name for path in checkpoints_in(folder.checkpoints)] == ["step_00000002"]
    assert problems_of(folder.checkpoints / "step_00000002") == []
