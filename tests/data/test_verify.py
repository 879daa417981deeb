"""``prepare RECIPE --verify``: every shard that is not what was written is named, whatever its size."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.__main__ import main
from pretrain.data.prepare import prepare
from pretrain.data.prepared import PreparedData
from tests.data.helpers import text_recipe
from tests.training.processes import write_recipe


def test_changed_bytes_are_found_without_the_corpus(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = text_recipe(tmp_path)
    prepare(recipe)
    command = ["prepare", write_recipe(recipe, tmp_path), "--verify"]
    (tmp_path / "corpus.txt").unlink()
    capfd.readouterr()
    assert main(command) == 0
    assert "6 shard files" in (said := capfd.readouterr().out) and "all valid" in said
    for name in ("train.bin", "test.idx"):
        path = tmp_path / "data" / name
        changed = bytearray(path.read_bytes())
        changed[len(changed) // 2] ^= 1
        path.write_bytes(changed)
    PreparedData.open(recipe)  # which does not look
    assert main(command) == 2
    error = capfd.readouterr().err
    said = [f"{name} has another SHA-256 than the manifest says" for name in ("train.bin", "test.idx")]
    assert f"error: {tmp_path}/data: {'; '.join(said)}; copy these files again" in error


def test_what_was_never_prepared_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = text_recipe(tmp_path)
    assert main(["prepare", write_recipe(recipe, tmp_path), "--verify"]) == 2
    assert "is not prepared" in capfd.readouterr().err
    assert not (tmp_path / "data").exists()
