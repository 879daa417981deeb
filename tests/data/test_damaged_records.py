"""``manifest.json`` and the records of an unfinished prepare, damaged: one clear error, or done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.data import prepare as prepare_module
from pretrain.data import shards
from pretrain.data.prepare import prepare
from pretrain.data.prepared import PreparedData
from tests.data.helpers import text_recipe
from tests.data.test_prepare import contents, in_folder, refusal


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK_TEXT_BYTES", 2_000)


DAMAGES = ["{", "[]", "null", '{"sha256": 3}', "[" * 100_000]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda text: text[:20])
@pytest.mark.parametrize("where", ["count_tokens", "write_split"])
def test_damaged_records_of_an_interrupted_prepare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, damage: str
) -> None:
    """What they say is done again: of the splits, and of the chunks of one."""
    recipe = text_recipe(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        target = prepare_module if where == "count_tokens" else shards
        patch.setattr(target, "count_tokens" if target is prepare_module else "_join", interrupted)
        prepare(recipe)
    records = [path for path in (tmp_path / "data" / "partial").rglob("*.json") if path.name != "inputs.json"]
    assert len(records) > 3
    for path in records:
        path.write_text(damage)
    assert prepare(recipe) == prepare(in_folder(recipe, tmp_path / "whole"))
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda text: text[:20])
def test_damaged_inputs_of_an_interrupted_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """Nothing tells that the work was of these inputs: it starts over."""
    recipe = text_recipe(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "count_tokens", interrupted)
        prepare(recipe)
    (tmp_path / "data" / "partial" / "inputs.json").write_text(damage)
    assert prepare(recipe) == prepare(in_folder(recipe, tmp_path / "whole"))


def test_a_manifest_with_values_of_wrong_types(tmp_path: Path) -> None:
    recipe = text_recipe(tmp_path)
    prepare(recipe)
    path = tmp_path / "data" / "manifest.json"
    tree = json.loads(path.read_text())
    train = tree["splits"]["train"]
    damaged = [
        *({**tree, key: wrong} for key in tree for wrong in (None, [1], 2.5, True)),
        {**tree, "tokenizer_sha256": "\ud800"},
        {**tree, "splits": {"train": train}},
        *({**tree, "splits": {**tree["splits"], "train": wrong}} for wrong in (None, [1], "x", {})),
        *(
            {**tree, "splits": {**tree["splits"], "train": {**train, key: wrong}}}
            for key in train
            for wrong in ([1], {})
        ),
    ]
    for content in (*map(json.dumps, damaged), "[" * 100_000, "[]", "3"):
        path.write_text(content)
        for action in (PreparedData.open, prepare):
            assert "is damaged" in refusal(recipe, action), content[:200]
