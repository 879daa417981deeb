"""A worker of ``prepare`` that is killed, as by the kernel when memory runs out."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from pretrain.data.prepare import PreparedData, prepare
from pretrain.data.workers import Workers
from pretrain.errors import UserError
from tests.data.helpers import text_recipe


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def double(number: int) -> int:
    return 2 * number


def fail(number: int) -> None:
    raise LookupError(f"no {number}")


def test_results_and_errors_come_through() -> None:
    with Workers(2) as workers:
        assert [workers.wait_for(workers.pool.apply_async(double, (n,)).get) for n in range(4)] == [0, 2, 4, 6]
        with pytest.raises(LookupError, match="no 3"):
            workers.wait_for(workers.pool.apply_async(fail, (3,)).get)
        numbers = workers.pool.imap(double, range(3))
        assert [workers.wait_for(numbers.next) for _ in range(3)] == [0, 2, 4]


def test_a_killed_worker_is_told() -> None:
    with (
        Workers(2) as workers,
        pytest.raises(UserError, match="one of 2 worker processes was killed, probably because"),
    ):
        workers.wait_for(workers.pool.apply_async(die, (1,)).get)


def test_prepare_with_a_killed_worker_goes_on_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text_recipe(tmp_path, prepare_processes=2)

    def killed(self: Any, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(IndexedDatasetBuilder, "add_document", killed)
        with pytest.raises(UserError, match="set data.prepare_processes lower and run it again"):
            prepare(recipe)
    assert not (tmp_path / "data" / "manifest.json").exists()
    prepare(recipe)
    assert PreparedData.open(recipe).train_tokens > 0
