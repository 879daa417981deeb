"""Whole runs with what others do against degeneration: they act, and are the same on every layout."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from agg import VocabShard
from pretrain.model.output_head import OutputHead
from tests.small_runs import change, train_on_ranks

PEERS = {  # stronger than in the recipes: six steps must show them
    "cosine": {"objective": {"method": "mle", "cosine_penalty": 10.0}},
    "mean": {"objective": {"method": "mle", "mean_penalty": 1e4}},
    "z-loss": {"objective": {"method": "mle", "z_loss": 0.1}},
    "soft-capped": {"objective": {"method": "mle"}, "model": {"logit_soft_cap": 0.3}},
    "untied": {"objective": {"method": "mle"}, "model": {"tied_embeddings": False}},
    "agg and all": {
        "objective": {"z_loss": 0.1, "cosine_penalty": 10.0, "mean_penalty": 1e4, "center_rows": True},
        "model": {"logit_soft_cap": 0.3},
        "optimizer": {"couple_embeddings": True},
    },
}

# All at once say whether any differs; which one it is, the long tests do.
EACH_AND_ALL = [name if name == "agg and all" else pytest.param(name, marks=pytest.mark.long) for name in PEERS]


@pytest.fixture(scope="module")
def alone(prepared_recipe, tmp_path_factory):
    made = {}

    def run(name: str):
        if name not in made:
            recipe = change(prepared_recipe, output_root=str(tmp_path_factory.mktemp("alone")))
            recipe = change(recipe, **PEERS.get(name, {"objective": {"method": name}}))
            made[name] = train_on_ranks(recipe, 1)
        return made[name]

    return run


@pytest.mark.parametrize(("tensor_parallel", "world_size", "stage"), [(1, 2, 1), (2, 4, 3)])
@pytest.mark.parametrize("name", EACH_AND_ALL)
def test_a_run_is_the_same_on_every_layout(prepared_recipe, alone, tmp_path, name, tensor_parallel, world_size, stage):
    parallel = {"tensor_model_parallel_size": tensor_parallel, "sharding": f"zero{stage}"}
    recipe = change(change(prepared_recipe, output_root=str(tmp_path), parallel=parallel), **PEERS[name])
    for mine, other in zip(train_on_ranks(recipe, world_size), alone(name), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=2e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert mine.get("rare_fraction") == other.get("rare_fraction")
        if "isotropy" in other:
            assert mine["mean_cosine"] == pytest.approx(other["mean_cosine"], abs=1e-4)
            assert mine["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("name", PEERS)
def test_each_acts(alone, name):
    records, plain = alone(name), alone("agg" if name.startswith("agg") else "mle")
    assert abs(records[-1]["loss"] - plain[-1]["loss"]) > 1e-3
    if name in ("cosine", "mean"):
        assert abs(records[-1]["mean_cosine"]) < 0.5 * abs(plain[-1]["mean_cosine"])
        assert records[0]["loss"] == pytest.approx(plain[0]["loss"], abs=0.01)  # the cross-entropy, no penalty in it


def test_validation_is_of_the_capped_model(prepared_recipe, tmp_path):
    """Under a cap near 0 every distribution is even, in training and in validation, whatever was learnt."""
    objective, model = {"method": "mle"}, {"logit_soft_cap": 1e-4}
    recipe = change(prepared_recipe, output_root=str(tmp_path), objective=objective, model=model)
    for record in train_on_ranks(recipe, 1):
        for key in record.keys() & {"loss", "validation_loss"}:
            assert record[key] == pytest.approx(math.log(500), abs=1e-3)


def test_every_answer_of_the_output_head_is_capped():
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (20, 128))
    target = torch.randint(100, (20,), generator=generator)
    head = OutputHead(VocabShard(0, 128, 100), soft_cap=2.0)
    capped = 2 * torch.tanh(hidden @ weight[:100].T / 2)
    losses, predicted = head(hidden, weight, target, per_token=True)
    expected = F.cross_entropy(capped, target, reduction="none")
    assert torch.allclose(head(hidden, weight, None), capped, atol=1e-6)
    assert torch.allclose(losses, expected, atol=1e-5) and torch.equal(predicted, capped.argmax(1))
    assert torch.allclose(head(hidden, weight, target), expected.sum(), atol=1e-4)
