"""JSON that is not what it should be: one clear error, no traceback."""

from __future__ import annotations

import json

import pytest

from pretrain.checkpointing.huggingface.config import config_problems
from pretrain.checkpointing.huggingface.files import INDEX_FILE, HuggingFaceFolder
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
