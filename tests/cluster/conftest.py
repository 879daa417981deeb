"""A small run in a folder of its own."""

from __future__ import annotations

import pytest

from tests.small_runs import change


@pytest.fixture
def recipe(prepared_recipe, tmp_path):
    return change(prepared_recipe, output_root=str(tmp_path / "runs"))
