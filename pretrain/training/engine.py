"""DeepSpeed around the model, on megatron-core's groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from pretrain.errors import NonFiniteError
from pretrain.model.gpt import CausalLanguageModel
from pretrain.recipe import OptimizerRecipe
from pretrain.topology import DeepSpeedGroups, Topology
from pretrain.training.deepspeed_config import zero_stage


def build_engine(
    model: CausalLanguageModel, optimizer: OptimizerRecipe, config: dict[str, Any], topology: Topology
) -> deepspeed.DeepSpeedEngine:
    """The engine, with AdamW and a guard that stops all ranks before an update that is not finite."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled at first use; gloo serves
    base = torch.optim.AdamW(
        decay_groups(model, optimizer.weight_decay),
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.epsilon,
    )
    base.register_step_pre_hook(_refuse_non_finite)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=base, config=config, mpu=DeepSpeedGroups(), dist_init_required=False
    )
    if zero_stage(config) == 3:  # the head uses a weight that belongs to another module
        deepspeed.zero.register_external_parameter(model.output_head, model.output_embedding)
    return engine


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def apply_update(engine: deepspeed.DeepSpeedEngine, learning_rate: float) -> None:
    """The optimizer step at the boundary of gradient accumulation.

    Raises:
        NonFiniteError: on all ranks, and no weight has changed.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    engine.step()
    if getattr(engine.optimizer, "overflow", False):  # ZeRO 1 and 2 look for themselves, and skip
        raise NonFiniteError("the gradient is not finite")


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float | None:
    """Global norm of the last step before clipping; None where the engine does not compute it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


@contextlib.contextmanager
def whole_output_embedding(engine: deepspeed.DeepSpeedEngine) -> Iterator[torch.Tensor]:
    """This rank's vocabulary rows [V_local, D] of the output embedding; gathers them under ZeRO 3."""
    weight = engine.module.output_embedding
    with deepspeed.zero.GatheredParameters([weight], enabled=engine.zero_optimization_partition_weights()):
        yield weight.detach()


def _refuse_non_finite(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    device = grads[0].device if grads else torch.device("cpu")
    bad = torch.zeros((), device=device)
    for grad in grads:
        bad += (~torch.isfinite(grad).all()).float()
    dist.all_reduce(bad)
    if bad > 0:
        raise NonFiniteError("the gradient is not finite")
