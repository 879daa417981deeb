"""A stage of a pipeline in the example for megatron-core."""

from __future__ import annotations

import functools

from pretrain.examples import megatron_core
from tests.distributed import run_ranks
from tests.test_examples import initialize_megatron


def test_megatron_core_builds_a_stage_without_the_loss():
    """Of a pipeline: only the last one has an output layer."""
    assert run_ranks(megatron_first_stage, 1) == [(False, True)]


def megatron_first_stage(rank, world_size):
    initialize_megatron(world_size)
    megatron_core.GatedGPTModel = functools.partial(megatron_core.GatedGPTModel, post_process=False)
    stage = megatron_core.build()
    return hasattr(stage, "output_layer"), hasattr(stage, "loss_of")
