"""How rare rows are treated: which parts of their gradient pass, when that changes, and the same on every layout."""

from __future__ import annotations

from itertools import product
from operator import sub

import pytest
import torch
import torch.distributed as dist

from agg import AdaptiveGradientGating
from pretrain.recipe import ObjectiveRecipe
from pretrain.training.objective import GatedObjective
from tests.agg.problems import make_problem
from tests.distributed import run_ranks
from tests.invariance.agg_layouts import groups
from tests.small_runs import change, train_on_ranks

TREATMENTS = [  # rare_rows, gates
    ("gate", "both"), ("gate", "g1"), ("gate", "g2"), ("block", "both"), ("block", "g1"), ("block", "g2"),
    ("train", "both"),
]  # fmt: skip


def one_rank(rank: int, world_size: int, data_parallel: int, tensor_parallel: int, rare_rows: str, gates: str):
    dp_group, tp_group = groups(rank, data_parallel, tensor_parallel)
    problem = make_problem(ignored=0.0)
    shard = problem.shard(dist.get_rank(tp_group), tensor_parallel, tp_group)
    share = slice(dist.get_rank(dp_group), None, data_parallel)
    module = AdaptiveGradientGating(
        shard, alpha=1.2, window_steps=2, reference_batch_tokens=64, data_parallel_group=dp_group
    )
    objective = GatedObjective(ObjectiveRecipe(alpha=1.2, rare_rows=rare_rows, gates=gates), module)
    objective.begin_step(problem.target[share], 1)
    weight = problem.local(shard)[0].clone().requires_grad_()
    hidden = problem.hidden[share].clone().requires_grad_()
    objective.loss(hidden, weight, problem.target[share]).backward()
    dist.all_reduce(weight.grad, group=dp_group)
    return shard.start, weight.grad, share.start, hidden.grad


def dense(rare_rows: str, gates: str):
    """dW of the paper's three parts of the gradient, and dH."""
    problem = make_problem(ignored=0.0)
    vocab, target = problem.vocab_size, problem.target
    counts = torch.bincount(target, minlength=vocab).double()
    rarity = counts / len(target) * 64
    rare = rarity < 1.2
    g1, g2 = rarity.clamp(max=1), (counts / counts[rare].mean()).clamp(max=1)
    passes = {"gate": (g1, g2), "block": (0 * g1, 0 * g2), "train": (0 * g1 + 1, 0 * g2 + 1)}[rare_rows]
    of_frequent = passes[0] if gates != "g2" else torch.ones(vocab)
    of_rare = passes[1] if gates != "g1" else torch.ones(vocab)
    error = (problem.hidden @ problem.weight[:vocab].T).softmax(1)
    error[torch.arange(len(target)), target] -= 1
    own = torch.zeros_like(error, dtype=torch.bool)
    own[torch.arange(len(target)), target] = True
    a = error.where(own, 0).T @ problem.hidden
    b = error.where(~own & ~rare[target][:, None], 0).T @ problem.hidden
    c = error.where(~own & rare[target][:, None], 0).T @ problem.hidden
    assert min(part[rare].abs().max() for part in (a, b, c)) > 1e-3
    gated = a + of_frequent[:, None] * b + of_rare[:, None] * c
    weight_grad = torch.zeros_like(problem.weight)
    weight_grad[:vocab] = torch.where(rare[:, None], gated, a + b + c)
    return weight_grad, error @ problem.weight[:vocab]


@pytest.mark.parametrize(("data_parallel", "tensor_parallel"), product((1, 2, 4), (1, 2, 4)))
@pytest.mark.parametrize(("rare_rows", "gates"), TREATMENTS)
def test_parts_of_the_gradient(rare_rows, gates, data_parallel, tensor_parallel):
    weight_grad, hidden_grad = dense(rare_rows, gates)
    ranks = run_ranks(one_rank, data_parallel * tensor_parallel, data_parallel, tensor_parallel, rare_rows, gates)
    for start, grad, share, rank_hidden_grad in ranks:
        assert (grad - weight_grad[start : start + len(grad)]).abs().max() < 1e-6  # gates are float32
        assert torch.allclose(rank_hidden_grad, hidden_grad[share::data_parallel], atol=1e-12)


def test_treatments_differ():
    made = [dense(*treatment)[0] for treatment in TREATMENTS]
    for place, one in enumerate(made):
        assert all((one - other).abs().max() > 1e-3 for other in made[:place])


SWITCHES = {
    "ungate": {"switch_step": 3, "rare_rows_after": "train"},
    "freeze": {"switch_step": 3, "rare_rows_after": "freeze"},
    "gate late": {"rare_rows": "train", "switch_step": 3, "rare_rows_after": "gate", "gates": "g1"},
}


@pytest.fixture(scope="module")
def alone(prepared_recipe, tmp_path_factory):
    """Losses of one process, by the name of a switch; None: never."""
    made = {}

    def run(name):
        if name not in made:
            objective = SWITCHES.get(name, {})
            recipe = change(prepared_recipe, output_root=str(tmp_path_factory.mktemp("alone")), objective=objective)
            made[name] = [record["loss"] for record in train_on_ranks(recipe, 1)]
        return made[name]

    return run


def test_a_switch_acts_from_its_step_on(alone, prepared_recipe, tmp_path):
    """The loss of a step is measured before its update."""
    gated = alone(None)
    for name in ("ungate", "freeze"):
        assert alone(name)[:3] == gated[:3] and alone(name)[3] != gated[3]
        assert max(map(abs, map(sub, alone(name), gated))) > 5e-5  # losses are equal to 2e-5 below
    plain = change(prepared_recipe, output_root=str(tmp_path), objective={"method": "mle"})
    plain_losses = [record["loss"] for record in train_on_ranks(plain, 1)]
    assert alone("gate late")[:3] == pytest.approx(plain_losses[:3], abs=1e-5)
    assert abs(alone("gate late")[-1] - plain_losses[-1]) > 1e-4


@pytest.mark.parametrize(
    ("name", "tensor_parallel", "world_size", "stage"),
    [("ungate", 2, 2, 1), ("freeze", 1, 2, 0), ("freeze", 2, 4, 3), ("gate late", 1, 2, 2)],
)
def test_switches_on_layouts_and_resumed(prepared_recipe, alone, tmp_path, name, tensor_parallel, world_size, stage):
    """Stopped just before the switch and just after it; on the same layout bit for bit."""
    recipe = change(
        prepared_recipe,
        objective=SWITCHES[name],
        parallel={"tensor_model_parallel_size": tensor_parallel, "sharding": f"zero{stage}"},
    )
    whole = train_on_ranks(change(recipe, output_root=str(tmp_path / "whole")), world_size)
    halves = change(recipe, output_root=str(tmp_path / "halves"))
    for stop in (2, 3, None):
        records = train_on_ranks(halves, world_size, stop_at_step=stop)
    for key in ("loss", "grad_norm", "rare_fraction"):
        assert [record[key] for record in records] == [record[key] for record in whole]
    assert [record["loss"] for record in whole] == pytest.approx(alone(name), abs=2e-5)
