"""The loss on a weight that DeepSpeed ZeRO 3 has partitioned over data-parallel ranks."""

from __future__ import annotations

import deepspeed
import pytest
import torch
import torch.distributed as dist

from agg import AdaptiveGradientGating
from tests.agg.problems import make_problem
from tests.distributed import run_ranks


class Model(torch.nn.Module):
    """A projection, and an output embedding that the loss uses whole."""

    def __init__(self, problem, data_parallel_group=None) -> None:
        super().__init__()
        self.projection = torch.nn.Linear(16, 16, bias=False)
        self.projection.weight.data = torch.eye(16) + 0.1
        self.output_embedding = torch.nn.Parameter(problem.weight.float())
        self.gating = AdaptiveGradientGating(
            problem.shard(0, 1),
            alpha=1.5,
            window_steps=2,
            reference_batch_tokens=64,
            data_parallel_group=data_parallel_group,
        )

    def forward(self, hidden, target):
        return self.gating(self.projection(hidden), self.output_embedding, target)


def inputs(problem, rank: int, world_size: int):
    hidden, target = problem.hidden.float(), problem.target.clamp(min=0)  # as many valid targets on each rank
    return hidden.chunk(world_size)[rank], target.chunk(world_size)[rank]


def partitioned(rank: int, world_size: int):
    problem = make_problem(tokens=96)
    deepspeed.ops.__compatible_ops__ = {}  # no compiler is needed
    deepspeed.utils.groups.mpu = None  # of an engine that this process built before
    model = Model(problem, dist.group.WORLD)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    shares = model.output_embedding.ds_tensor.numel()
    loss = engine(*inputs(problem, rank, world_size))
    engine.backward(loss)
    grads = [deepspeed.utils.safe_get_full_grad(p).clone() for p in (model.projection.weight, model.output_embedding)]
    return shares, loss.detach(), *grads


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_equal_those_of_one_process(world_size):
    problem = make_problem(tokens=96)
    model = Model(problem)
    loss = model(*inputs(problem, 0, 1))
    loss.backward()
    assert model.gating.current_gates().rare.any()
    ranks = run_ranks(partitioned, world_size)
    assert torch.allclose(torch.stack([rank[1] for rank in ranks]).mean(), loss.detach(), rtol=1e-6)
    for shares, _, projection_grad, embedding_grad in ranks:
        assert shares * world_size == problem.weight.numel()
        for got, expected in (
            (projection_grad, model.projection.weight.grad),
            (embedding_grad, model.output_embedding.grad),
        ):
            # Sums of 96 float32 terms in another order.
            assert (got - expected).abs().max() <= 96 * torch.finfo(torch.float32).eps * expected.abs().max()
