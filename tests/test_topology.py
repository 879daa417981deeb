"""Places that launchers give, and layouts that fit."""

from __future__ import annotations

import pytest

from pretrain.errors import RecipeError, UserError
from pretrain.topology import Place, data_parallel_size_of, place_from_environment
from tests.small_runs import change


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Place(3, 4, 1)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, Place(5, 8, 1)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, None),  # a shell
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script, not a step of it
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"},
            Place(1, 2, 1),  # torchrun inside srun
        ),
    ],
)
def test_place(environment, place):
    assert place_from_environment(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2 is not in a world of WORLD_SIZE=2"),
    ],
)
def test_place_that_is_none(environment, message):
    with pytest.raises(UserError, match=message):
        place_from_environment(environment)


def test_layouts(prepared_recipe):
    recipe = change(prepared_recipe, parallel={"tensor_model_parallel_size": 2})
    assert data_parallel_size_of(recipe, 4) == 2
    with pytest.raises(RecipeError, match="does not divide the 3 started ranks"):
        data_parallel_size_of(recipe, 3)
    with pytest.raises(RecipeError, match="needs 4 ranks, but 2 were started"):
        data_parallel_size_of(change(recipe, parallel={"data_parallel_size": 2}), 2)
    with pytest.raises(RecipeError, match="not a multiple"):
        data_parallel_size_of(recipe, 6)
