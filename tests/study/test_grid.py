"""The runs of a study: which there are, what each recipe says, and what follows from what."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.errors import UserError
from pretrain.model.size import model_size
from pretrain.study.grid import cells_of
from pretrain.study.study_file import load_study
from tests.study.studies import OBJECTIVES, SIZES, write_study


@pytest.fixture
def grid(prepared_recipe, tmp_path):
    """The runs by name, and what is wrong with the others."""

    def make(**keys):
        cells, refused = cells_of(load_study(write_study(tmp_path, prepared_recipe, **keys)))
        return {cell.name: cell for cell in cells}, refused

    return make


def test_every_combination_with_its_recipe(grid, tmp_path):
    cells, refused = grid()
    assert list(cells) == [f"{size}-{method}-seed{seed}" for size in SIZES for method in OBJECTIVES for seed in (1, 2)]
    cell = cells["s-agg-seed2"]
    assert refused == {} and cell.labels == {"size": "s", "objective": "agg", "seed": 2} and cell.method == "agg"
    recipe = cell.recipe
    assert (recipe.model.hidden_size, recipe.objective.method, recipe.seed) == (32, "agg", 2)
    assert recipe.run_folder == tmp_path / "out" / "small" / "s-agg-seed2"
    assert cells["xs-plain-seed1"].recipe.objective.method == "mle"


def test_exclusions(grid):
    cells, _ = grid(exclude=[{"size": "s", "objective": "agg"}, {"seed": [2], "size": ["xs", "s"]}])
    assert list(cells) == ["xs-plain-seed1", "xs-agg-seed1", "s-plain-seed1"]
    with pytest.raises(UserError, match="has no runs: its exclude leaves none"):
        grid(exclude=[{"seed": [1, 2]}])


def test_without_an_axis_of_objectives_the_method_is_the_recipes(grid):
    cells, _ = grid(axes={"seed": [1]})
    assert cells["seed1"].method == "agg"


def test_tokens_from_parameters(grid, prepared_recipe):
    cells, _ = grid(follow={"tokens_per_parameter": 2, "warmup_fraction": 0.1})
    for cell in cells.values():
        parameters = model_size(cell.recipe.model, 500).total
        assert cell.recipe.batch.train_steps == round(2 * parameters / (8 * 32))
        assert cell.recipe.schedule.warmup_steps == round(0.1 * cell.recipe.batch.train_steps)
    steps = {name: cell.recipe.batch.train_steps for name, cell in cells.items()}
    assert steps["s-plain-seed1"] > 2 * steps["xs-plain-seed1"]


def test_tokens_as_an_axis_or_for_all(grid):
    cells, _ = grid(axes={"tokens": [256, 1500, 1]})
    assert [cell.recipe.batch.train_steps for cell in cells.values()] == [1, 6, 1]
    cells, _ = grid(axes={"tokens_per_parameter": [1, 2]})
    one, two = (cell.recipe.batch.train_steps for cell in cells.values())
    assert two == pytest.approx(2 * one, abs=1)
    cells, _ = grid(follow={"tokens": 1024})
    assert {cell.recipe.batch.train_steps for cell in cells.values()} == {4}


def test_learning_rate_from_width(grid):
    cells, _ = grid(
        follow={"learning_rate": {"rule": "width_power", "reference": 0.004, "reference_width": 32, "power": -2}}
    )
    assert cells["s-agg-seed1"].recipe.optimizer.learning_rate == pytest.approx(0.004)
    assert cells["xs-agg-seed1"].recipe.optimizer.learning_rate == pytest.approx(0.016)


def test_width_from_depth_and_the_learning_rate_after_it(grid):
    cells, _ = grid(
        axes={"num_layers": [1, 3]},
        follow={
            "width": {"rule": "depth_multiple", "multiple": 16, "head_size": 8},
            "learning_rate": {"rule": "width_power", "reference": 0.01, "reference_width": 16},
            "tokens_per_parameter": 1,
        },
    )
    small, large = (cell.recipe for cell in cells.values())
    assert (small.model.hidden_size, small.model.num_attention_heads) == (16, 2)
    assert (large.model.hidden_size, large.model.num_attention_heads) == (48, 6)
    assert large.optimizer.learning_rate == pytest.approx(0.01 / 3)
    assert large.batch.train_steps == round(model_size(large.model, 500).total / 256)


def test_each_vocabulary_has_its_data_folder(grid, prepared_recipe):
    cells, _ = grid(axes={"vocab_size": [400, 600], "seed": [1, 2]})
    folder = prepared_recipe.data.folder
    assert [cell.recipe.data.folder for cell in cells.values()] == [
        f"{folder}-vocab_size400", f"{folder}-vocab_size400", f"{folder}-vocab_size600", f"{folder}-vocab_size600",
    ]  # fmt: skip
    assert cells["vocab_size600-seed1"].recipe.data.tokenizer.vocab_size == 600
    own = {"a": {"data.tokenizer.vocab_size": 400, "data.folder": "mine"}}
    cells, _ = grid(axes={"vocabulary": own})
    assert cells["a"].recipe.data.folder == str(Path("mine").absolute())


def test_every_impossible_run_is_named(grid):
    cells, refused = grid(
        axes={"size": {"a": {"model.hidden_size": 30}, "b": {"model.hidden_size": 32}}, "seed": [1, -1]}
    )
    assert list(cells) == ["b-seed1"] and set(refused) == {"a-seed1", "a-seed-1", "b-seed-1"}
    assert "is not divisible by model.num_attention_heads (4)" in refused["a-seed1"][0]
    assert len(refused["a-seed-1"]) == 2
    _, refused = grid(axes={"size": {"a": {"model.hidden_size": "wide"}}})
    assert refused == {"a": ["model.hidden_size is 'wide', must be a whole number"]}
    _, refused = grid(axes={"tokens": [0]})
    assert refused["tokens0"] == ["tokens is 0, must be a finite number above 0"]
    _, refused = grid(axes={"size": {"a": {"model.num_attention_heads": 0}}}, follow={"tokens_per_parameter": 1})
    assert "model.num_attention_heads is 0, must be at least 1" in refused["a"]
