"""Every file of a checkpoint, damaged in every way: named, refused, and the newest good state used."""

from __future__ import annotations

import random
import shutil

import pytest

from pretrain.checkpointing.folder import checkpoints_in, problems_of, read_manifest, write_manifest
from pretrain.run_folder import RunFolder
from tests.distributed import run_ranks
from tests.faults.harness import DAMAGES, damage_each_file, exact, flip_bit, resume_rank, same_state
from tests.small_runs import change, read_metrics, train_on_ranks

FILES = (
    "MANIFEST.json",
    "mp_rank_00_model_states.pt",
    "parameters.json",
    "rank_00000.pt",
    "rank_00001.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero_pp_rank_1_mp_rank_00_optim_states.pt",
)


@pytest.fixture(scope="module")
def run(prepared_recipe, tmp_path_factory):
    """Six steps on two ranks, with all checkpoints."""
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path_factory.mktemp("damage")),
        checkpoint={"every_steps": 2, "keep_last": 9},
        parallel={"data_parallel_size": 2},
    )
    train_on_ranks(recipe, 2)
    return recipe


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run.run_folder, tmp_path / run.name)
    return change(run, output_root=str(tmp_path))


def test_each_file_in_each_way(copy):
    checkpoint = RunFolder(copy.run_folder).checkpoints / "step_00000006"
    assert tuple(sorted(path.name for path in checkpoint.iterdir())) == FILES
    assert damage_each_file(checkpoint, random.Random(3)) == len(FILES) * len(DAMAGES)


def test_a_bit_anywhere_in_the_manifest(copy):
    """Also where the text means the same: the manifest is what was written, byte for byte."""
    checkpoint = RunFolder(copy.run_folder).checkpoints / "step_00000006"
    manifest = checkpoint / "MANIFEST.json"
    content = manifest.read_bytes()
    for bit in range(0, 8 * len(content), 13):
        flip_bit(manifest, bit)
        assert problems_of(checkpoint, hashed=False), bit
        manifest.write_bytes(content)
    manifest.write_bytes(content.replace(b"\n", b" \n", 1))
    assert problems_of(checkpoint, hashed=False) == ["MANIFEST.json was changed: it does not have its own SHA-256"]


@pytest.mark.parametrize(
    ("name", "damage", "latest"),
    [
        ("mp_rank_00_model_states.pt", "truncated", b"step_00000006\n"),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "one bit flipped", b"\x00\xff garbage"),
        ("MANIFEST.json", "deleted", b"step_00000099\n"),
        ("rank_00001.pt", "emptied", None),
    ],
)
def test_the_newest_good_state_is_used(run, copy, capfd, name, damage, latest):
    checkpoints = RunFolder(copy.run_folder).checkpoints
    DAMAGES[damage](checkpoints / "step_00000006" / name, random.Random(5))
    (checkpoints / "latest").unlink()
    if latest is not None:
        (checkpoints / "latest").write_bytes(latest)
    assert run_ranks(resume_rank, 2, copy) == ["", ""]
    out = capfd.readouterr().out
    assert f"passed over step_00000006: {name} " in out and "goes on from step 4" in out
    assert (f"{checkpoints / 'latest'} " in out) == (latest != b"step_00000006\n")
    assert (checkpoints / "latest").read_text() == "step_00000006\n"
    assert exact(copy) == exact(run) and same_state(run, copy, 6) == []


def test_nothing_good_is_never_a_start_from_scratch(copy):
    folder = RunFolder(copy.run_folder)
    for checkpoint in checkpoints_in(folder.checkpoints):
        flip_bit(checkpoint / "rank_00000.pt", 100)
    before = read_metrics(copy)
    for message in run_ranks(resume_rank, 2, copy):
        assert "holds no checkpoint that verifies (step_00000006, step_00000004, step_00000002)" in message
        assert "--from-scratch" in message
    for checkpoint in checkpoints_in(folder.checkpoints):
        shutil.rmtree(checkpoint)
    assert all("all are gone" in message for message in run_ranks(resume_rank, 2, copy))
    assert read_metrics(copy) == before


def test_a_file_that_does_not_belong(copy):
    """DeepSpeed would count it as a tensor-parallel rank."""
    checkpoint = RunFolder(copy.run_folder).checkpoints / "step_00000006"
    shutil.copy(checkpoint / "mp_rank_00_model_states.pt", checkpoint / "mp_rank_01_model_states.pt")
    assert problems_of(checkpoint) == ["mp_rank_01_model_states.pt is not in MANIFEST.json"]


def test_another_learning_rate_is_named(copy):
    other = change(copy, optimizer={"learning_rate": 0.5})
    for message in run_ranks(resume_rank, 2, other):
        assert "is of another run (optimizer.learning_rate: saved with 0.003, now 0.5" in message


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default(copy):
    checkpoint = RunFolder(copy.run_folder).checkpoints / "step_00000006"
    manifest = read_manifest(checkpoint)
    del manifest["identity"]["objective"]["z_loss"]
    write_manifest(checkpoint, manifest)
    for message in run_ranks(resume_rank, 2, change(copy, objective={"z_loss": 0.5})):
        assert "is of another run (objective.z_loss: saved with 0.0, now 0.5" in message
    assert run_ranks(resume_rank, 2, copy) == ["", ""]


@pytest.mark.parametrize("damaged", [False, True])
def test_retention(prepared_recipe, tmp_path, damaged):
    """The last two and every fifth; a damaged one pushes out no good one."""
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path),
        checkpoint={"every_steps": 1, "keep_last": 2, "keep_every_steps": 5},
        batch={"train_steps": 8},
    )
    folder = RunFolder(recipe.run_folder).checkpoints
    train_on_ranks(recipe, 1, stop_at_step=7)
    assert [path.name[-1] for path in checkpoints_in(folder)] == ["7", "6", "5"]
    (folder / "tmp_step_00000099_0badf00d").mkdir()
    if damaged:
        (folder / "step_00000007" / "rank_00000.pt").unlink()
    train_on_ranks(change(recipe, checkpoint={"every_steps": 4}), 1)
    assert [path.name[-1] for path in checkpoints_in(folder)] == ["8", "7", *["6"][: int(damaged)], "5"]
    assert not list(folder.glob("tmp_*"))
