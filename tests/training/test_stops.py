"""A loss or gradient that is not finite stops all ranks before the update."""

from __future__ import annotations

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param

from pretrain.errors import NonFiniteError
from tests.distributed import run_ranks
from tests.small_runs import change


def poisoned_step(rank, world_size, recipe, what):
    """One good step, then one in which data-parallel rank 1 alone goes wrong."""
    from pretrain.data.loader import TrainingBatches, training_dataset
    from pretrain.topology import connect
    from pretrain.training.loop import train_step
    from pretrain.training.setup import build_run

    run = build_run(recipe, connect(recipe))
    batches = iter(
        TrainingBatches(
            training_dataset(run.prepared, recipe),
            micro_batch_size=2,
            global_batch_size=8,
            data_parallel_rank=run.topology.data_parallel_rank,
            data_parallel_size=run.topology.data_parallel_size,
        )
    )
    train_step(run, next(batches))
    before = weights(run.engine)
    if run.topology.data_parallel_rank == 1:
        head, loss = run.engine.module.output_head, run.objective.loss
        if what == "loss":
            head.loss = lambda *arguments: loss(*arguments) * torch.nan
        else:
            head.loss = lambda hidden, weight, target: loss(_NanBackward.apply(hidden), weight, target)
    try:
        train_step(run, next(batches))
    except NonFiniteError as error:
        same = all(torch.equal(a, b) for a, b in zip(before, weights(run.engine), strict=True))
        return str(error), same, run.progress.step
    return None


def weights(engine):
    """Copies of all weights, from the fp32 shards where there are any."""
    if not engine.zero_optimization():
        return [parameter.detach().clone() for parameter in engine.module.parameters()]
    return [safe_get_full_fp32_param(parameter).clone() for parameter in engine.module.parameters()]


class _NanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")]
)
def test_all_ranks_stop_before_the_update(prepared_recipe, what, stage, precision):
    recipe = change(
        prepared_recipe, precision=precision, parallel={"sharding": f"zero{stage}", "data_parallel_size": 2}
    )
    for message, unchanged, step in run_ranks(poisoned_step, 2, recipe, what):
        assert message.startswith(f"step 2: the {what} is ") and unchanged and step == 1
