"""Places that launchers give, and layouts that fit."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from pretrain.errors import RecipeError, UserError
from pretrain.place import Place, data_parallel_size_of, place_from_environment
from pretrain.topology import check_devices, connect
from tests.cluster.test_arrival import connect_on
from tests.small_runs import change, on_ranks


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


def give_gpus(monkeypatch, gpus):
    """As many as ``gpus()`` says on the rank that asks."""
    monkeypatch.setattr(torch.cuda, "device_count", gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus() > 0)


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        (
            "cuda",
            {},
            "device is cuda, but torch can use no GPU on node0 (ranks 0-1), node1 (ranks 2-3); device=cpu runs",
        ),
        ("cuda", {"node0": 2}, "device is cuda, but torch can use no GPU on node1 (ranks 2-3); device=cpu runs"),
        (
            "auto",
            {"node1": 2},
            "on node0 (ranks 0-1) there is no GPU that torch can use (device is auto), but there is on node1",
        ),
        ("auto", {"node0": 2, "node1": 1}, "2 ranks on node1, but 1 GPU(s) that rank 3 can use: start fewer there, "),
    ],
    ids=["none", "cuda", "auto", "too few"],
)
def test_devices_of_a_launchers_ranks(prepared_recipe, monkeypatch, device, gpus, message):
    """All ranks hear the same, before any of them trains on something else."""
    give_gpus(monkeypatch, lambda: gpus.get(socket.gethostname(), 0))
    outcomes = connect_on(on_ranks(change(prepared_recipe, device=device), 4), range(4), 4)
    assert len(outcomes) == 4 and len(set(outcomes.values())) == 1
    assert str(outcomes[0]).startswith(message)


def test_devices_of_a_world_of_one(prepared_recipe, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    give_gpus(monkeypatch, lambda: 0)
    with pytest.raises(UserError, match="device is cuda, but torch can use no GPU on .* runs without"):
        connect(on_ranks(change(prepared_recipe, device="cuda"), 1))


def test_devices_of_this_machine(prepared_recipe, monkeypatch):
    for device, gpus in (("cpu", 0), ("cpu", 1), ("auto", 0), ("auto", 2), ("cuda", 3)):
        give_gpus(monkeypatch, lambda gpus=gpus: gpus)
        check_devices(change(prepared_recipe, device=device), 2)
    give_gpus(monkeypatch, lambda: 1)
    with pytest.raises(UserError, match=r"2 ranks on .*, but 1 GPU.* device=cpu.* lower degrees .* reshard RUN"):
        check_devices(change(prepared_recipe, device="auto"), 2)
