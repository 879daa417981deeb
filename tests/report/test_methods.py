"""Which runs are seeds of one method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from pretrain.report.methods import Method, group_runs, settings_that_differ
from pretrain.report.run_records import read_runs
from pretrain.report.table import sections
from tests.report.synthetic_runs import (
    STEPS,
    TOKENS_PER_STEP,
    skip_step,
    write_published_model,
    write_run,
    write_seeds,
)


def grouped(folders: list[Path]) -> list[Method]:
    return group_runs(read_runs(folders))


def change(folder: Path, section: str, key: str, value: object) -> Path:
    path = folder / "recipe.yaml"
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    (tree[section] if section else tree)[key] = value
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return folder


def test_runs_that_differ_only_by_the_seed(tmp_path: Path) -> None:
    folders = [folder for kind in ("mle", "agg", "exclude") for folder in write_seeds(tmp_path, kind, (3, 1, 12))]
    mixed = [folders[i] for i in (0, 3, 6, 1, 4, 7, 2, 5, 8)]
    methods = grouped(mixed)
    assert [method.name for method in methods] == ["mle", "agg", "exclude"]
    assert [method.seeds for method in methods] == [[3, 1, 12]] * 3
    assert settings_that_differ(methods[2], methods[1]) == {"objective.never_seen": "exclude"}


@pytest.mark.parametrize(
    ("section", "key", "value", "methods"),
    [
        ("", "output_root", "elsewhere", 1),
        ("parallel", "tensor_model_parallel_size", 2, 1),
        ("batch", "micro_batch_size", 2, 1),
        ("reporting", "log_every_steps", 7, 1),
        ("model", "activation_checkpointing", "full", 1),
        ("objective", "alpha", 0.013, 2),
        ("optimizer", "learning_rate", 2e-3, 2),
        ("batch", "global_batch_size", 64, 2),
        ("", "precision", "bf16", 2),
    ],
)
def test_what_makes_another_method(section: str, key: str, value: object, methods: int, tmp_path: Path) -> None:
    folders = write_seeds(tmp_path, "agg", (1, 2))
    change(folders[1], section, key, value)
    assert len(grouped(folders)) == methods


def test_a_run_of_before_a_key_has_its_default(tmp_path: Path) -> None:
    folders = write_seeds(tmp_path, "agg", (1, 2))
    path = folders[1] / "recipe.yaml"
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    del tree["model"]["logit_soft_cap"], tree["spikes"]
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    (method,) = grouped(folders)
    assert method.seeds == [1, 2]


def test_another_checkpoint_or_text_makes_another_method(tmp_path: Path) -> None:
    folders = write_seeds(tmp_path / "a", "agg", (1,)) + write_seeds(tmp_path / "b", "agg", (2,), checkpoint_step=1000)
    assert len(grouped(folders)) == 2
    targets = {"frequent": 1, "medium": 1, "rare": 1, "total": 3}
    folders = folders[:1] + write_seeds(tmp_path / "c", "agg", (2,), target_tokens=targets)
    assert len(grouped(folders)) == 2


def test_one_seed_twice_is_not_two_seeds(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "a", seed=1), write_run(tmp_path, "b", seed=1), write_run(tmp_path, "c", seed=2)]
    methods = grouped(folders)
    assert [method.seeds for method in methods] == [[1, 2], [1]]


@pytest.mark.parametrize(("seeds", "change"), [((2, 3), "+5.9 %"), ((3, 4), "")])
def test_differences_are_over_the_seeds_in_common(seeds: tuple[int, int], change: str, tmp_path: Path) -> None:
    """As the table says, and not between means of other seeds."""
    methods = grouped(write_seeds(tmp_path, "mle", (1, 2)) + write_seeds(tmp_path, "agg", seeds))
    total = next(row for section in sections(methods) for row in section.rows if row.label == "total")
    assert total.cells[1].change == change


def test_models_without_a_recipe_stay_apart(tmp_path: Path) -> None:
    folders = [write_published_model(tmp_path / place) for place in ("a", "b")]
    methods = grouped(folders)
    assert [len(method.records) for method in methods] == [1, 1]
    assert [method.name for method in methods] == [f"gpt2 ({folder})" for folder in folders]


def test_names_without_the_seed(tmp_path: Path) -> None:
    names = {"x_s1": 1, "x_s2": 2}
    assert grouped([write_run(tmp_path / "a", name, seed=seed) for name, seed in names.items()])[0].name == "x"
    same = [write_run(tmp_path / f"b{seed}", "same", seed=seed) for seed in (1, 2)]
    assert grouped(same)[0].name == "same"
    other = [write_run(tmp_path / "c", name, seed=seed) for seed, name in enumerate(("one", "two", "three"))]
    assert grouped(other)[0].name == "one and 2 more"
    assert grouped([write_run(tmp_path / "d", "alone-seed4", seed=4)])[0].name == "alone-seed4"


def test_a_curve_over_seeds(tmp_path: Path) -> None:
    folders = write_seeds(tmp_path, "agg", (1, 2, 3))
    lines = (folders[2] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (folders[2] / "metrics.jsonl").write_text("\n".join(lines[10:]) + "\n", encoding="utf-8")
    (method,) = grouped(folders)
    curve = method.curve("loss")
    assert len(curve.tokens) == STEPS // 10 - 10  # where all seeds have it
    np.testing.assert_array_equal(curve.tokens, method.first.series("loss")[0][-190:])
    values = np.array([record.series("loss")[1][-190:] for record in method.records])
    np.testing.assert_allclose(curve.mean, values.mean(axis=0))
    np.testing.assert_allclose(curve.low, values.min(axis=0))
    np.testing.assert_allclose(curve.high, values.max(axis=0))
    assert method.curve("never_measured").mean.shape == (0,)
    assert len(method.last("g1_by_decile")["never_seen"]) == 3


def test_a_skipped_step_of_one_seed_leaves_the_curves(tmp_path: Path) -> None:
    """From there on the seeds have been trained on different numbers of tokens at the same step."""
    folders = write_seeds(tmp_path, "agg", (1, 2))
    skip_step(folders[1], 10)
    (method,) = grouped(folders)
    loss, isotropy = method.curve("loss"), method.curve("isotropy")
    assert len(loss.mean) == STEPS // 10 - 1  # at the skipped step there is none
    assert len(isotropy.mean) == STEPS // 50
    assert loss.tokens[-1] == (STEPS - 0.5) * TOKENS_PER_STEP
    values = np.array([record.series("isotropy")[1] for record in method.records])
    np.testing.assert_array_equal(isotropy.mean, values.mean(axis=0))
    np.testing.assert_array_equal(isotropy.tokens, (np.arange(50, STEPS + 1, 50) - 0.5) * TOKENS_PER_STEP)
