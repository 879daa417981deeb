"""A compiled model trains as a plain one does, on up to 2 x 2 ranks.

Dynamo and AOTAutograd see the counts, the gates and the loss; inductor would need a compiler.
"""

from __future__ import annotations

import os

import pytest
import torch

from agg import AdaptiveGradientGating
from tests.agg.problems import make_problem
from tests.distributed import run_ranks
from tests.invariance.agg_layouts import groups

aot_eager = torch._dynamo.lookup_backend("aot_eager")


def compiled_and_plain(rank, world_size, tensor_parallel):
    """Losses, rows of the weight and counts of a plain and of a compiled model after three steps."""
    os.environ["TORCHDYNAMO_DISABLE"] = "0"  # the pipeline, and so the tests, compile nothing else
    problem, data_parallel = make_problem(), world_size // tensor_parallel
    dp_group, tp_group = groups(rank, data_parallel, tensor_parallel)
    dp_rank, shard = rank // tensor_parallel, problem.shard(rank % tensor_parallel, tensor_parallel, tp_group)
    answers, graphs = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    for compiled in (False, True):
        module = AdaptiveGradientGating(
            shard, alpha=0.3, window_steps=4, reference_batch_tokens=64, data_parallel_group=dp_group
        )
        weight = problem.weight[shard.start : shard.stop].clone().requires_grad_()

        def loss_of(hidden, weight, target, module=module):
            return module(hidden.tanh(), weight, target)

        call = torch.compile(loss_of, backend=backend) if compiled else loss_of
        optimizer, losses = torch.optim.SGD([weight], lr=0.5), []
        for step in range(3):
            target = torch.where(problem.target >= 0, (problem.target + 7 * step) % 507, problem.target)
            hidden, target = (whole.chunk(data_parallel)[dp_rank] for whole in (problem.hidden, target))
            losses.append(call(hidden, weight, target))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        answers.append((torch.stack(losses).detach(), weight.detach(), module.frequency.appearances))
    assert graphs  # or nothing would have been compiled
    return answers


# In ranks of their own also for one: what a compiler leaves in a process, fake tensors for one, other tests would meet.
@pytest.mark.parametrize(("data_parallel", "tensor_parallel"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_compiled_model_trains_the_same(data_parallel, tensor_parallel):
    ranks = run_ranks(compiled_and_plain, data_parallel * tensor_parallel, tensor_parallel)
    for plain, compiled in ranks:
        for one, other in zip(plain, compiled, strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    counts = torch.cat([plain[2] for plain, _ in ranks[:tensor_parallel]])  # of the shards of one data-parallel rank
    assert counts.sum() == 3 * (make_problem().target >= 0).sum()
