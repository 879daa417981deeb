"""A checkpoint of one layout into an engine of another."""

from __future__ import annotations

import hashlib

import deepspeed
import torch

from pretrain.checkpointing.deepspeed_files import Kind
from pretrain.checkpointing.fragments import Fragment, optimizer_fragments
from pretrain.checkpointing.portable import PortableCheckpoint
from pretrain.checkpointing.split import parameter_splits
from pretrain.errors import UserError
from pretrain.topology import Topology

ADAM_STATES: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def load_portable(engine: deepspeed.DeepSpeedEngine, portable: PortableCheckpoint, topology: Topology) -> None:
    """Set weights, Adam's state and step counts exactly as they were saved; a collective.

    A tensor at a time: beside the engine a rank holds no more than copies of one parameter. Under ZeRO 1 and 2 it
    reads the parameters that it updates, under ZeRO 0 and 3 all of them.

    Raises:
        UserError: the checkpoint is of another model, or the engine's optimizer is not one that is known here.
    """
    _check_same_model(engine, portable, topology.tensor_parallel_size)
    fragments = optimizer_fragments(engine)
    if engine.zero_optimization_partition_weights():
        engine.optimizer.checkpoint_event_prologue()  # frees the weights that are gathered now
    for fragment in fragments:
        flats: dict[Kind, torch.Tensor] = {"weight": fragment.flat}
        flats |= _adam_state(engine.basic_optimizer, fragment, portable.adam_step)
        for kind, flat in flats.items():
            part = portable.part(fragment.name, kind, topology.tensor_parallel_rank, topology.tensor_parallel_size)
            target = flat.view(-1)[fragment.offset : fragment.offset + fragment.numel]
            target.copy_(part.flatten()[fragment.start : fragment.start + fragment.numel])
    _refresh_working_weights(engine)
    engine.global_steps, engine.global_samples = portable.step, portable.consumed_samples


def seed_of_resume(seed: int, data_parallel_rank: int, consumed_samples: int) -> int:
    """A fresh seed for dropout where the random streams of the saved layout cannot go on.

    Tensor-parallel ranks of one replica share it, data-parallel ranks do not, and it differs from that of every
    other moment of the run.
    """
    digest = hashlib.sha256(f"{seed} {data_parallel_rank} {consumed_samples}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _check_same_model(engine: deepspeed.DeepSpeedEngine, portable: PortableCheckpoint, size: int) -> None:
    here = parameter_splits(engine.module, size)
    for name in sorted(here.keys() | portable.splits.keys()):
        if here.get(name) != portable.splits.get(name):
            raise UserError(
                f"{portable.folder} is of another model: {name} is {portable.splits.get(name, 'not there')}, "
                f"here it is {here.get(name, 'not there')}"
            )


def _adam_state(optimizer: torch.optim.Optimizer, fragment: Fragment, step: int) -> dict[Kind, torch.Tensor]:
    """Adam's state of what the fragment is in; made as torch does at its first step, if there is none yet."""
    state = optimizer.state[fragment.flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for kind in ADAM_STATES:
            state[kind] = torch.zeros_like(fragment.flat)
    state["step"].fill_(step)
    return {kind: state[kind] for kind in ADAM_STATES}


def _refresh_working_weights(engine: deepspeed.DeepSpeedEngine) -> None:
    """The weights that the model runs with, from the fp32 ones; as DeepSpeed does at the end of a step."""
    optimizer = engine.optimizer
    if engine.zero_optimization_partition_weights():
        for sub_group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
        optimizer.checkpoint_event_epilogue()  # gathers the weights that stay whole on every rank
    elif engine.zero_optimization():
        optimizer.update_lp_params()
    elif engine.bfloat16_enabled():
        for low_group, high_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, high in zip(low_group, high_group, strict=True):
                low.copy_(high)
