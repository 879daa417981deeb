"""Before anything else: quiet third parties, one thread a process, so that forked ranks do not fight."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is declared

from pretrain.quiet import quiet_third_party

quiet_third_party()

import random  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from pretrain.recipe import Recipe  # noqa: E402
from tests.small_runs import small_recipe  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 lines of made-up words with a Zipf tail, in which the next word depends on the last."""
    draw = random.Random(7)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choice(letters) for _ in range(draw.randint(2, 8))) for _ in range(800)]
    lines = []
    for _ in range(600):
        place, line = draw.randrange(800), []
        for _ in range(draw.randint(10, 40)):
            place = int(800 * draw.random() ** 3) if draw.random() < 0.5 else (place * 7 + 3) % 800
            line.append(words[place])
        lines.append(" ".join(line))
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prepared_recipe(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A small recipe whose data folder is prepared."""
    from pretrain.data.prepare import prepare

    recipe = small_recipe(corpus_file, tmp_path_factory.mktemp("prepared") / "data")
    prepare(recipe)
    return recipe
