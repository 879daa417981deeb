"""JSON that is not what it should be: one clear error, no traceback."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from pretrain.checkpointing.folder import MANIFEST, problems_of
from pretrain.checkpointing.huggingface import export
from pretrain.checkpointing.huggingface.config import config_problems
from pretrain.checkpointing.huggingface.files import INDEX_FILE, HuggingFaceFolder
from pretrain.checkpointing.huggingface.tensors import tensor_maps
from pretrain.data.prepared import TOKENIZER_NAME
from pretrain.errors import UserError
from pretrain.recipe import ModelRecipe

DEEP = "[" * 100_000


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("value", ["linear", 2.0, [], ["linear"], False])
def test_odd_rope(style, key, value):
    problems = config_problems({"model_type": style, key: value}, ModelRecipe(style=style))
    assert problems == [f"{key} is {value!r} there, and must be an object"]


@pytest.mark.parametrize(
    "weight_map", [None, [], "x", {"a": 1}, {"a": ["x"]}, {"a": "../x"}, {"a": "/x"}, {"a": ".."}, {"a": ""}]
)
def test_odd_weight_map(tmp_path, weight_map):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="index.json is damaged: its weight_map"):
        HuggingFaceFolder(tmp_path)


@pytest.mark.parametrize("name", ["\0", "\ud800"])
def test_a_file_that_cannot_be(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        HuggingFaceFolder(tmp_path)


def test_a_deep_config(tmp_path):
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(UserError, match="config.json is damaged"):
        HuggingFaceFolder(tmp_path)


@pytest.mark.parametrize(
    "content", ['{"sha256": "\\ud800"}', '{"sha256": "x", "files": "\\ud800"}', DEEP, "[]", "null"]
)
def test_a_manifest(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{MANIFEST} was changed" if content != DEEP else f"{MANIFEST} cannot be read")


def test_a_manifest_of_any_depth(tmp_path):
    """At some it can be read, but not written again to be hashed."""
    for depth in range(800, 1000):
        (tmp_path / MANIFEST).write_text('{"sha256": "x", "files": ' + "[" * depth + "]" * depth + "}")
        (problem,) = problems_of(tmp_path)
        assert problem.startswith(MANIFEST), depth


def test_a_disk_that_is_full_for_the_tokenizer(prepared_recipe, tmp_path, monkeypatch):
    write_tokenizer = export.write_tokenizer

    def full(tokenizer_file, folder):
        (folder / "tokenizer.json").symlink_to("/dev/full")
        return write_tokenizer(tokenizer_file, folder)

    monkeypatch.setattr(export, "write_tokenizer", full)
    model, tokenizer = prepared_recipe.model, Path(prepared_recipe.data.folder) / TOKENIZER_NAME
    names = [entry.ours for entry in tensor_maps(model, 500)]
    with pytest.raises(UserError, match=f"the disk of {tmp_path}/out is full") as caught:
        export.export_huggingface(None, names, model, tokenizer, tmp_path / "out")
    assert caught.value.__cause__.errno == errno.ENOSPC and not list(tmp_path.iterdir())
