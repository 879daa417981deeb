"""The loss on a weight that DeepSpeed ZeRO 3 has partitioned over data-parallel ranks."""

from __future__ import annotations

import deepspeed
import pytest
import torch
import torch.distributed as dist

from agg import AdaptiveGradientGating
from tests.agg.problems import Problem, make_problem
from tests.distributed import run_ranks
from tests.invariance.agg_layouts import OPTIONS, REFERENCE, WINDOW, zipf_steps

MICRO_BATCHES = 2


class Model(torch.nn.Module):
    """A projection, and an output embedding that the loss uses whole."""

    def __init__(self, problem: Problem, data_parallel_group=None) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(16, 16, bias=False)
        self.projection.weight.data = torch.eye(16) + 0.1
        self.output_embedding = torch.nn.Parameter(problem.weight.float())
        self.gating = AdaptiveGradientGating(
            problem.shard(0, 1),
            window_steps=WINDOW,
            reference_batch_tokens=REFERENCE,
            data_parallel_group=data_parallel_group,
            **OPTIONS,
        )

    def forward(self, hidden, target, scale: float):
        return scale * self.gating(self.projection(hidden), self.output_embedding, target, reduction="sum")


def count(model: Model, problem: Problem, rank: int = 0, world_size: int = 1) -> None:
    """Steps that put gates strictly between 0 and 1, then the one of the problem."""
    for targets in (*zipf_steps(WINDOW), problem.target):
        model.gating.begin_step(targets.chunk(world_size)[rank])


def partitioned(rank: int, world_size: int):
    problem = make_problem()
    deepspeed.ops.__compatible_ops__ = {}  # no compiler is needed
    deepspeed.utils.groups.mpu = None  # of an engine that this process built before
    model = Model(problem, dist.group.WORLD)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    shares = model.output_embedding.ds_tensor.numel()
    count(model, problem, rank, world_size)
    scale = world_size * MICRO_BATCHES / int((problem.target >= 0).sum())  # the engine takes means over both
    loss = torch.zeros(())
    hidden, target = (x.chunk(world_size)[rank].chunk(MICRO_BATCHES) for x in (problem.hidden.float(), problem.target))
    for inputs in zip(hidden, target, strict=True):
        part = engine(*inputs, scale)
        engine.backward(part)
        loss += part.detach() / (world_size * MICRO_BATCHES)
    grads = [deepspeed.utils.safe_get_full_grad(p).clone() for p in (model.projection.weight, model.output_embedding)]
    return shares, loss, *grads


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_equal_those_of_one_process(world_size):
    """Ignored targets lie unevenly over ranks and micro-batches, so that a mean of means would be another one."""
    problem = make_problem()
    model = Model(problem)
    count(model, problem)
    valid = problem.target >= 0
    loss = model(problem.hidden.float(), problem.target, 1 / int(valid.sum()))
    loss.backward()
    gates, own = model.gating.current_gates(), problem.target[valid]
    own = own[gates.rare[own]]
    assert ((gates.g1 > 0) & (gates.g1 < 1) & (gates.g2 > 0) & (gates.g2 < 1) & (gates.g1 != gates.g2))[own].any()
    assert 0 < len(own) < valid.sum()
    ranks = run_ranks(partitioned, world_size)
    assert torch.allclose(torch.stack([rank[1] for rank in ranks]).sum(), loss.detach(), rtol=1e-6)
    for shares, _, projection_grad, embedding_grad in ranks:
        assert shares * world_size == problem.weight.numel()
        for got, expected in (
            (projection_grad, model.projection.weight.grad),
            (embedding_grad, model.output_embedding.grad),
        ):
            # Sums of 96 float32 terms in another order.
            assert (got - expected).abs().max() <= 96 * torch.finfo(torch.float32).eps * expected.abs().max()
