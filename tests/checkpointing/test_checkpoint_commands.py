"""``pretrain checkpoint list | verify``, and going back with ``train --resume-from`` and ``--from-scratch``."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.__main__ import main
from pretrain.checkpointing import checkpoint as checkpoint_module
from pretrain.checkpointing.folder import checkpoints_in, remove
from pretrain.recipe_io import recipe_to_dict
from pretrain.run_folder import RunFolder
from tests.faults.harness import flip_bit
from tests.small_runs import change, read_metrics, train_on_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(prepared_recipe, tmp_path_factory):
    """Six steps on one rank, a checkpoint every two."""
    recipe = change(
        prepared_recipe,
        output_root=str(tmp_path_factory.mktemp("commands")),
        checkpoint={"every_steps": 2, "keep_last": 9},
        reporting={"geometry_every_steps": 0, "validate_every_steps": 0},
        parallel={"data_parallel_size": 1},
    )
    train_on_ranks(recipe, 1)
    return recipe


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run.run_folder, tmp_path / run.name)
    return change(run, output_root=str(tmp_path))


def called(capfd, *arguments, code=0):
    capfd.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    return capfd.readouterr().out


def test_list(copy, capfd):
    checkpoints = RunFolder(copy.run_folder).checkpoints
    flip_bit(checkpoints / "step_00000004" / "rank_00000.pt", 999)
    (checkpoints / "step_00000006" / "MANIFEST.json").unlink()
    (checkpoints / "tmp_step_00000008_ab").mkdir()
    (checkpoints / "latest").write_text("x")
    lines = called(capfd, "checkpoint", "list", copy.run_folder).splitlines()
    assert lines[0].split() == ["step", "tokens", "layout", "size", "age", "state"]
    assert lines[1].split()[:2] == ["2", "512"] and "tensor-parallel 1 x data-parallel 1, ZeRO 1, fp32" in lines[1]
    assert lines[1].endswith(" s  valid") and " kB " in lines[1]
    assert lines[2].endswith("damaged: rank_00000.pt has another SHA-256 than the manifest says")
    assert lines[3].split()[:3] == ["6", "?", "?"] and lines[3].endswith("damaged: MANIFEST.json is missing")
    assert "tmp_step_00000008_ab is unfinished" in lines[4] and "latest names 'x'" in lines[5]
    assert "sizes are right" in called(capfd, "checkpoint", "list", "--no-hash", copy.run_folder).splitlines()[2]
    rows = json.loads(called(capfd, "checkpoint", "list", "--json", copy.run_folder))
    assert [(row["step"], row["valid"]) for row in rows] == [(2, True), (4, False), (6, False)]
    assert rows[0]["tokens"] == 512 and rows[0]["layout"]["zero_stage"] == 1


def test_verify(copy, capfd):
    checkpoints = RunFolder(copy.run_folder).checkpoints
    out = called(capfd, "checkpoint", "verify", copy.run_folder)
    assert [line.split(":")[0] for line in out.splitlines()] == [f"step_0000000{step}" for step in (2, 4, 6)]
    assert out.count("all valid") == 3
    for name in ("rank_00000.pt", "mp_rank_00_model_states.pt"):
        flip_bit(checkpoints / "step_00000004" / name, 999)
    out = called(capfd, "checkpoint", "verify", copy.run_folder, code=2)
    for name in ("rank_00000.pt", "mp_rank_00_model_states.pt"):
        assert f"step_00000004: {name} has another SHA-256 than the manifest says" in out
    called(capfd, "checkpoint", "verify", copy.run_folder, "--step", 6)
    called(capfd, "checkpoint", "verify", copy.run_folder, "--step", 4, code=2)


def delete_before(monkeypatch, checkpoint, calls):
    """A training deletes this checkpoint before the n-th look at one of its files."""
    looks, stat = itertools.count(1), Path.stat

    def racing(self, **options):
        if self.parent == checkpoint and next(looks) == calls:
            remove(checkpoint)
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", racing)


@pytest.mark.parametrize("calls", [1, 2, 9, 14])
def test_what_is_deleted_meanwhile_is_left_out(copy, capfd, monkeypatch, calls):
    checkpoints = RunFolder(copy.run_folder).checkpoints
    with monkeypatch.context() as patched:
        delete_before(patched, checkpoints / "step_00000002", calls)
        rows = json.loads(called(capfd, "checkpoint", "list", "--json", copy.run_folder))
    assert [(row["step"], row["valid"]) for row in rows] == [(4, True), (6, True)]
    with monkeypatch.context() as patched:
        delete_before(patched, checkpoints / "step_00000004", calls)
        out = called(capfd, "checkpoint", "verify", copy.run_folder)
    assert out.startswith("step_00000004: deleted meanwhile\nstep_00000006: ") and out.endswith("all valid\n")
    with monkeypatch.context() as patched:
        delete_before(patched, checkpoints / "step_00000006", calls)
        called(capfd, "checkpoint", "verify", copy.run_folder, "--step", 6, code=2)


@pytest.mark.parametrize("calls", [1, 6, 9, 12])
def test_export_of_what_is_deleted_meanwhile(copy, capfd, monkeypatch, tmp_path, calls):
    """While it is chosen, while it is verified, and before tensors are read."""
    delete_before(monkeypatch, RunFolder(copy.run_folder).checkpoints / "step_00000004", calls)
    assert main(["checkpoint", "export", str(copy.run_folder), "--step", "4", "--output", str(tmp_path / "out")]) == 2
    message = capfd.readouterr().err
    assert "step_00000004 was deleted meanwhile" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sharding", ["zero1", "zero2"])  # the layout that saved it, and another
def test_evaluation_of_what_is_deleted_after_it_was_verified(copy, capfd, monkeypatch, sharding):
    verify = checkpoint_module._verify

    def and_delete(checkpoint, topology):
        verify(checkpoint, topology)
        remove(checkpoint)

    monkeypatch.setattr(checkpoint_module, "_verify", and_delete)
    saved = RunFolder(copy.run_folder).recipe_file
    saved.write_text(yaml.safe_dump(recipe_to_dict(change(copy, parallel={"sharding": sharding}))), encoding="utf-8")
    assert main(["evaluate", str(copy.run_folder), "--checkpoint", "4"]) == 2
    assert "step_00000004 was deleted meanwhile" in capfd.readouterr().err


def test_what_is_not_there(copy, capfd, tmp_path):
    for arguments, part in (
        (["verify", copy.run_folder, "--step", "5"], "has no checkpoint of step 5; there are: 2, 4, 6"),
        (["verify", tmp_path], "is not a run"),
        (["list", tmp_path / "none"], "is not a run"),
    ):
        assert main(["checkpoint", *map(str, arguments)]) == 2
        assert part in capfd.readouterr().err
    shutil.rmtree(RunFolder(copy.run_folder).checkpoints)
    assert main(["checkpoint", "verify", str(copy.run_folder)]) == 2
    assert "has no checkpoint yet" in capfd.readouterr().err


def test_no_torch(copy):
    code = "import sys; from pretrain.__main__ import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "checkpoint", "list", str(copy.run_folder)], cwd=ROOT, check=True)


def test_evaluation_of_a_damaged_checkpoint_is_refused(copy, capfd):
    checkpoint = RunFolder(copy.run_folder).checkpoints / "step_00000006"
    flip_bit(checkpoint / "rank_00000.pt", 999)
    assert main(["evaluate", str(copy.run_folder)]) == 2
    assert "step_00000006 is damaged: rank_00000.pt has another SHA-256" in capfd.readouterr().err
    (checkpoint / "rank_00000.pt").unlink()
    assert main(["evaluate", str(copy.run_folder)]) == 2
    assert "rank_00000.pt is missing. The newest whole one is of step 4" in capfd.readouterr().err


def test_export_of_a_damaged_checkpoint_is_refused(copy, capfd, tmp_path):
    """A flipped bit leaves the size as it was."""
    folder = RunFolder(copy.run_folder)
    name = next(folder.checkpoints.glob("step_00000006/*optim_states.pt")).name
    flip_bit(folder.checkpoints / "step_00000006" / name, 9999)
    assert main(["checkpoint", "export", str(copy.run_folder), "--output", str(tmp_path / "out")]) == 2
    assert f"step_00000006 is damaged: {name} has another SHA-256" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_export_looks_at_its_output_first(copy, capfd, tmp_path):
    """Before minutes of hashing, here of a checkpoint that would not verify."""
    flip_bit(RunFolder(copy.run_folder).checkpoints / "step_00000006" / "rank_00000.pt", 999)
    assert main(["checkpoint", "export", str(copy.run_folder), "--output", str(copy.run_folder)]) == 2
    assert "exists and is not an empty folder" in capfd.readouterr().err


def test_what_was_left_behind_is_not_evaluated_again(copy, capfd, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(copy)), encoding="utf-8")
    folder = RunFolder(copy.run_folder)
    for step in (2, 4, 6):
        called(capfd, "evaluate", folder.path, "--checkpoint", step)
    before = json.loads(folder.evaluation_file.read_text())
    out = called(capfd, "train", path, "optimizer.learning_rate=0.03", "--allow-changes", "--resume-from", 4)
    (aside,) = (folder.path / "aside").iterdir()
    assert f"what was there is kept in {aside}" in out
    assert sorted(str(entry.relative_to(aside)) for entry in aside.rglob("evaluation*.*")) == [
        "evaluation.json",
        "evaluation.npz",
    ]
    assert sorted(entry.name for entry in (folder.path / "evaluations").iterdir()) == [
        f"step_0000000{step}.{kind}" for step in (2, 4) for kind in ("json", "npz")
    ]
    assert "evaluated already" not in called(capfd, "evaluate", folder.path)
    assert json.loads(folder.evaluation_file.read_text())["perplexity"] != before["perplexity"]


def test_a_checkpoint_from_before_an_allowed_change(copy, capfd, tmp_path):
    """It can be measured and written with; to go on from it is another change, asked for before anything moves."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(copy)), encoding="utf-8")
    folder, change_it = RunFolder(copy.run_folder), ["optimizer.learning_rate=0.03", "batch.train_steps=7"]
    called(capfd, "train", path, *change_it, "--allow-changes")
    called(capfd, "evaluate", folder.path, "--checkpoint", 2)
    called(capfd, "generate", folder.path, "--checkpoint", 2, "--prompt", "ab", "--max-new-tokens", 2)
    there = checkpoints_in(folder.checkpoints)
    assert main(["train", str(path), *change_it, "--resume-from", "2"]) == 2
    message = capfd.readouterr().err
    assert "step_00000002 is of another run (optimizer.learning_rate: saved with 0.003, now 0.03)" in message
    assert message.rstrip().endswith("--allow-changes of train goes on from it")
    assert checkpoints_in(folder.checkpoints) == there and not (folder.path / "aside").exists()
    called(capfd, "train", path, *change_it, "--resume-from", 2, "--allow-changes")


def test_another_device_is_no_other_run(copy, capfd):
    """As one that was trained on a GPU, on a machine that may have none."""
    saved = RunFolder(copy.run_folder)
    saved.recipe_file.write_text(yaml.safe_dump(recipe_to_dict(change(copy, device="cuda"))), encoding="utf-8")
    saved.check(change(copy, device="cpu"))
    called(capfd, "evaluate", saved.path, "device=cpu")
    called(capfd, "generate", saved.path, "device=cpu", "--prompt", "ab", "--max-new-tokens", 2)
    assert main(["generate", str(saved.path), "seed=3", "--prompt", "ab"]) == 2
    assert "only device=... may be given" in capfd.readouterr().err


@pytest.mark.parametrize("chained", [False, True])
def test_a_job_goes_back_once(copy, capfd, tmp_path, monkeypatch, chained):
    """SLURM starts the same command again after the time limit, and in the next job of a chain."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(copy)), encoding="utf-8")
    folder = RunFolder(copy.run_folder)

    def start(job_id, restarts, *options):
        for name, value in {
            "SLURM_JOB_ID": job_id,
            "SLURM_ARRAY_JOB_ID": "5" if chained else job_id,
            "SLURM_RESTART_COUNT": str(restarts),
            "PRETRAIN_INCARNATION": f"{job_id}.{restarts}",
        }.items():
            monkeypatch.setenv(name, value)
        (folder.path / ".incarnation").write_text(f"{job_id}.{restarts}")
        return called(capfd, "train", path, *options)

    going_back = ["--resume-from", "2"]
    assert "is kept in" in start("5", 0, *going_back)
    out = start("6" if chained else "5", 0 if chained else 1, *going_back)
    assert "has gone back as asked" in out and "trained already" in out
    assert checkpoints_in(folder.checkpoints)[0].name == "step_00000006"
    monkeypatch.delenv("PRETRAIN_INCARNATION")  # by hand it is as often as it is said
    shutil.rmtree(folder.path / "aside")
    assert "is kept in" in called(capfd, "train", path, *going_back)
    shutil.rmtree(folder.path / "aside")
    if not chained:
        assert "is kept in" in start("9", 0, "--from-scratch"), "another job goes back too"


def test_going_back(run, copy, capfd, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_to_dict(copy)), encoding="utf-8")
    folder = RunFolder(copy.run_folder)
    newest = folder.checkpoints / "step_00000006"
    shutil.copytree(newest, newest.with_name("tmp_step_00000006_moved"))  # of a reshard that was killed early
    out = called(capfd, "train", path, "--resume-from", 2)
    (aside,) = (folder.path / "aside").iterdir()
    assert f"what was there is kept in {aside}" in out and "goes on from step 2 (512 tokens)" in out
    assert [entry.name for entry in checkpoints_in(aside / "checkpoints")] == ["step_00000006", "step_00000004"]
    assert [record["loss"] for record in read_metrics(copy)] == [record["loss"] for record in read_metrics(run)]
    assert (aside / "metrics.jsonl").read_bytes() == RunFolder(run.run_folder).metrics_file.read_bytes()
    assert "trained already" in called(capfd, "train", path)

    shutil.rmtree(folder.path / "aside")
    out = called(capfd, "train", path, "optimizer.learning_rate=0.001", "--from-scratch")
    (aside,) = (folder.path / "aside").iterdir()
    assert "goes on" not in out and len(read_metrics(copy)) == 6
    assert read_metrics(copy)[-1]["loss"] != read_metrics(run)[-1]["loss"]
    kept = RunFolder(aside)
    assert kept.saved_recipe().optimizer.learning_rate == 3e-3 and len(checkpoints_in(kept.checkpoints)) == 3

    flip_bit(folder.checkpoints / "step_00000002" / "rank_00000.pt", 5)
    assert main(["train", str(path), "optimizer.learning_rate=0.001", "--resume-from", "2"]) == 2
    assert "step_00000002 is damaged" in capfd.readouterr().err and len(checkpoints_in(folder.checkpoints)) == 3
