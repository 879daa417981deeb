"""Checkpoints that were saved once, for all tests of this folder."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.checkpointing.layouts import VARIANTS, Layout, Saved, save_on
from tests.small_runs import change


@pytest.fixture(scope="session")
def variant(prepared_recipe):
    """The recipe of one of ``VARIANTS``."""
    return lambda name: change(prepared_recipe, **VARIANTS[name])


@pytest.fixture(scope="session")
def saved_on(variant, tmp_path_factory) -> Callable[[str, Layout], Saved]:
    """A run of a variant, saved on a layout."""
    root = tmp_path_factory.mktemp("saved")
    return functools.cache(lambda name, layout: save_on(variant(name), layout, root / name))
