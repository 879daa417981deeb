"""DeepSpeed around the model, on megatron-core's groups."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pretrain.errors import NonFiniteError
from pretrain.model.gpt import CausalLanguageModel
from pretrain.recipe import OptimizerRecipe
from pretrain.topology import DeepSpeedGroups, Topology
from pretrain.training.deepspeed_config import zero_stage


def build_engine(
    model: CausalLanguageModel, optimizer: OptimizerRecipe, config: dict[str, Any], topology: Topology
) -> deepspeed.DeepSpeedEngine:
    """The engine, with AdamW and a guard that stops all ranks before an update that is not finite."""
    # DeepSpeed would compile a shared-memory collective at first use, and probe for other extensions with the
    # compiler and linker; gloo and nccl serve, and there may be no compiler.
    deepspeed.ops.__compatible_ops__ = {}
    base = torch.optim.AdamW(
        decay_groups(model, optimizer.weight_decay),
        lr=0.0,  # set before each step; some wrappers step once on zero gradients to make their state
        betas=optimizer.betas,
        eps=optimizer.epsilon,
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=base, config=config, mpu=DeepSpeedGroups(), dist_init_required=False
    )
    if zero_stage(config) == 0:
        for state in base.state.values():  # of that step on zero gradients
            state["step"].zero_()
    if zero_stage(config) == 3:  # the head uses a weight that belongs to another module
        deepspeed.zero.register_external_parameter(model.output_head, model.output_embedding)
    clip_norm = optimizer.gradient_clipping if zero_stage(config) == 0 else 0.0
    engine.update_guard = UpdateGuard(base, clip_norm, topology.device)
    return engine


class UpdateGuard:
    """Runs just before the optimizer steps: refuses what is not finite, and clips where DeepSpeed does not.

    Without ZeRO, DeepSpeed 0.19 keeps no norm for fp32, and for bf16 gets the norm of tensor-parallel ranks wrong.
    There the norm is taken here, and ``deepspeed_config`` turns DeepSpeed's own clipping off.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float, device: torch.device) -> None:
        self.clip_norm = clip_norm
        self._device = device  # offloaded gradients are elsewhere, and nccl reduces nothing there
        self.grad_norm: torch.Tensor | None = None  # of the coming step, where it is taken here
        optimizer.register_step_pre_hook(self._check)

    def _check(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = torch.zeros((), device=self._device)
        for grad in grads:
            bad += (~torch.isfinite(grad).all()).to(self._device, torch.float32)
        dist.all_reduce(bad)
        if bad > 0:
            raise NonFiniteError("the gradient is not finite")
        if self.clip_norm and self.grad_norm is not None and self.grad_norm > self.clip_norm:
            for grad in grads:
                grad *= (self.clip_norm / self.grad_norm).to(grad.dtype)


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def apply_update(engine: deepspeed.DeepSpeedEngine, learning_rate: float) -> float:
    """The optimizer step at the boundary of gradient accumulation.

    Returns:
        The global gradient norm before clipping.

    Raises:
        NonFiniteError: on all ranks, and no weight has changed.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    if not engine.zero_optimization():
        engine.update_guard.grad_norm = _gradient_norm(engine.module)
    engine.step()
    if getattr(engine.optimizer, "overflow", False):  # the wrappers look for themselves, and skip the update
        raise NonFiniteError("the gradient is not finite")
    own_norm = engine.update_guard.grad_norm
    return float(engine.get_global_grad_norm() if own_norm is None else own_norm)


def _gradient_norm(model: torch.nn.Module) -> torch.Tensor:
    """2-norm over all tensor-parallel ranks of gradients that data-parallel ranks have averaged already."""
    group = parallel_state.get_tensor_model_parallel_group()
    squares = torch.zeros((), dtype=torch.float64)
    for parameter in model.parameters():
        split = getattr(parameter, "tensor_model_parallel", False)
        if parameter.grad is not None and (split or group.rank() == 0):
            squares = squares.to(parameter.grad.device) + parameter.grad.double().square().sum()
    dist.all_reduce(squares, group=group)
    return squares.sqrt()


@contextlib.contextmanager
def whole_output_embedding(engine: deepspeed.DeepSpeedEngine) -> Iterator[torch.Tensor]:
    """This rank's vocabulary rows [V_local, D] of the output embedding; gathers them under ZeRO 3."""
    weight = engine.module.output_embedding
    with deepspeed.zero.GatheredParameters([weight], enabled=engine.zero_optimization_partition_weights()):
        yield weight.detach()
