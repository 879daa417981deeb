"""What moves within a run folder."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from pretrain import run_folder
from pretrain.run_folder import RunFolder


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run whose ``checkpoints`` is a link to another file system, as a scratch disk is."""
    run, disk = tmp_path / "run", tmp_path / "disk"
    for step in (1, 2):
        (disk / f"step_{step:08d}").mkdir(parents=True)
        (disk / f"step_{step:08d}" / "weights").write_text(f"of step {step}")
    run.mkdir()
    (run / "checkpoints").symlink_to(disk)
    rename = os.rename

    def on_one_disk(source: str, target: str) -> None:
        if len({os.path.realpath(os.path.dirname(path)).startswith(str(disk)) for path in (source, target)}) > 1:
            raise OSError(errno.EXDEV, "Invalid cross-device link", source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", on_one_disk)
    monkeypatch.setattr(run_folder, "choose_checkpoint", lambda folder, step: folder / f"step_{step:08d}")
    monkeypatch.setattr(run_folder, "problems_of", lambda checkpoint: [])
    return RunFolder(run)


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_going_back_where_checkpoints_lie_on_another_disk(apart: RunFolder) -> None:
    aside = apart.go_back_to(1)
    assert aside is not None and texts(aside) == {"checkpoints/step_00000002/weights": "of step 2"}
    assert texts(apart.checkpoints.resolve()) == {"latest": "step_00000001\n", "step_00000001/weights": "of step 1"}


def test_going_back_takes_evaluations_along_whatever_a_copy_is_called(apart: RunFolder) -> None:
    (apart.path / "evaluations").mkdir()
    for name in ("step_00000001.json", "step_00000002.npz", "step_00000002 (copy).json", "step_of_mine"):
        (apart.path / "evaluations" / name).touch()
    aside = apart.go_back_to(1)
    assert aside is not None
    moved = {path.name for path in (aside / "evaluations").iterdir()}
    assert moved == {"step_00000002.npz", "step_00000002 (copy).json"}


def test_the_index_of_samples_stays_where_it_is(tmp_path: Path) -> None:
    """It is of the data: the run that begins anew takes it again."""
    (tmp_path / "run" / "index_cache" / "key").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text("name: run")
    aside = RunFolder(tmp_path / "run").start_again()
    assert aside is not None and texts(aside) == {"recipe.yaml": "name: run"}
    assert (tmp_path / "run" / "index_cache" / "key").is_dir()


def test_another_layout_where_checkpoints_lie_on_another_disk(apart: RunFolder) -> None:
    new = apart.path / "resharding" / "step_00000002"
    shutil.copytree(apart.checkpoints / "step_00000002", new)
    (new / "weights").write_text("resharded")
    aside = apart.replace_checkpoint(apart.checkpoints / "step_00000002", new)
    assert texts(aside) == {"checkpoints/step_00000002/weights": "of step 2"} and not new.exists()
    kept = {"step_00000001/weights": "of step 1", "step_00000002/weights": "resharded"}
    assert texts(apart.checkpoints.resolve()) == kept
