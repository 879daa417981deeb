"""Before anything else: quiet third parties, one thread a process, so that forked ranks do not fight."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is declared

from pretrain.quiet import quiet_third_party

quiet_third_party()

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from pretrain.recipe import Recipe  # noqa: E402
from tests.small_runs import small_recipe, write_corpus  # noqa: E402

torch.set_num_threads(1)

MOST_THREADS = 50
# Test files that take minutes, and so begin first: the last of them would else run alone on one of several workers.
LONGEST = (
    "test_pipeline", "study/test_runner", "checkpointing/test_resume_layouts", "agg/test_gpu_path",
    "training/test_resume", "training/test_stopping", "test_examples", "training/test_layouts",
    "invariance/test_agg_compiled", "faults/test_kills_of_commands", "training/test_watchdog",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"tests/{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.fixture(autouse=True)
def threads_of_groups_end() -> Iterator[None]:
    """A gloo group that a command has left to the collector has a thread that wakes a hundred times a second."""
    yield
    if len(os.listdir("/proc/self/task")) > MOST_THREADS:
        gc.collect()


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`tests.small_runs.write_corpus`."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    write_corpus(path)
    return path


@pytest.fixture(scope="session")
def prepared_recipe(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A small recipe whose data folder is prepared."""
    from pretrain.data.prepare import prepare

    recipe = small_recipe(corpus_file, tmp_path_factory.mktemp("prepared") / "data")
    prepare(recipe)
    return recipe
