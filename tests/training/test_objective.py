"""What the recipe says about the objective and the optimizer reaches them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from agg import VocabShard, gated_linear_cross_entropy
from pretrain.recipe import ObjectiveRecipe
from pretrain.training.engine import decay_groups
from pretrain.training.objective import GatedObjective, PlainObjective, build_objective

SHARD = VocabShard(0, 128, 100)
COUNTS = np.array([0, 0, 50, 0] + [200] * 40 + [1] * 50 + [0] * 6, dtype=np.int64)


def build(soft_cap=0.0, **fields):
    return build_objective(
        ObjectiveRecipe(**fields),
        SHARD,
        special_ids=(0, 1, 2, 3),
        token_counts=COUNTS,
        steps_per_epoch=17,
        data_parallel_group=None,
        soft_cap=soft_cap,
    )


def rare_after_one_step(objective) -> set[int]:
    ids = torch.repeat_interleave(torch.arange(100), torch.from_numpy(COUNTS))
    objective.begin_step(ids, 1)
    return set(objective.module.current_gates().rare.nonzero().squeeze(1).tolist())


def test_special_ids_are_never_rare_and_never_seen_is_a_choice():
    gated, excluding = build(alpha=20.0, never_seen="gate"), build(alpha=20.0, never_seen="exclude")
    assert rare_after_one_step(gated) == set(range(44, 100))
    assert rare_after_one_step(excluding) == set(range(44, 94))
    assert gated.rare_fraction() == 56 / 100


def test_window_is_an_epoch_unless_given():
    assert build().module.frequency.window_steps == 17
    assert build(window_steps=3).module.frequency.window_steps == 3


@pytest.mark.parametrize("method", ["mle", "agg"])
def test_label_smoothing_reaches_the_loss(method):
    objective = build(method=method, label_smoothing=0.2)
    assert isinstance(objective, GatedObjective) == (method == "agg")
    hidden, weight, target = torch.randn(9, 4), torch.randn(128, 4), torch.randint(4, 90, (9,))
    objective.begin_step(target, 1)
    expected = gated_linear_cross_entropy(hidden, weight, target, None, SHARD, reduction="sum", label_smoothing=0.2)
    assert torch.allclose(objective.loss(hidden, weight, target), expected)
    assert not torch.allclose(expected, PlainObjective(ObjectiveRecipe(), SHARD).loss(hidden, weight, target))


@pytest.mark.parametrize("method", ["mle", "agg"])
def test_z_loss_and_the_cap_reach_the_gradient(method):
    objective = build(method=method, z_loss=0.3, soft_cap=1.5)
    hidden, target = torch.randn(9, 4), torch.randint(4, 90, (9,))
    objective.begin_step(target, 1)
    gates = objective.module.current_gates() if method == "agg" else None
    weight, other = (torch.ones(128, 4).mul_(0.3).requires_grad_() for _ in range(2))
    objective.loss(hidden, weight, target).backward()
    gated_linear_cross_entropy(
        hidden, other, target, gates, SHARD, reduction="sum", z_loss=0.3, soft_cap=1.5
    ).backward()
    assert torch.equal(weight.grad, other.grad)


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Embedding(5, 2))
    decayed, free = decay_groups(model, 0.3)
    assert [p.dim() for p in decayed["params"]] == [2, 2] and decayed["weight_decay"] == 0.3
    assert [p.dim() for p in free["params"]] == [1, 1, 1] and free["weight_decay"] == 0.0
