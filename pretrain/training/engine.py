"""DeepSpeed around the model, on megatron-core's groups."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from megatron.core import parallel_state

from pretrain.errors import NonFiniteError
from pretrain.model.gpt import CausalLanguageModel
from pretrain.quiet import without_prints
from pretrain.recipe import OptimizerRecipe
from pretrain.topology import Topology
from pretrain.training.deepspeed_config import zero_stage
from pretrain.training.deepspeed_groups import DeepSpeedGroups
from pretrain.training.spikes import Spike

Judge = Callable[[float], Spike | None]


def build_engine(
    model: CausalLanguageModel, optimizer: OptimizerRecipe, config: dict[str, Any], topology: Topology
) -> deepspeed.DeepSpeedEngine:
    """The engine, with AdamW and a guard that keeps all ranks from an update that must not be."""
    # DeepSpeed would compile a shared-memory collective at first use, and probe for other extensions with the
    # compiler and linker; gloo and nccl serve, and there may be no compiler.
    deepspeed.ops.__compatible_ops__ = {}
    base = torch.optim.AdamW(
        decay_groups(model, optimizer.weight_decay),
        lr=0.0,  # set before each step; some wrappers step once on zero gradients to make their state
        betas=optimizer.betas,
        eps=optimizer.epsilon,
    )
    with without_prints():  # its wrapper around bf16 tells of memory
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
    if engine.zero_optimization():
        engine.update_guard.watch(engine.optimizer, engine.mpu)
    return engine


class UpdateGuard:
    """Decides just before the optimizer steps whether it may, and clips where DeepSpeed does not.

    DeepSpeed takes a gradient norm that is not finite as the sign to skip the update and to clear every gradient that
    it holds, so a refused step is one whose norm is said to be infinite. Without ZeRO, DeepSpeed 0.19 keeps no norm for
    fp32, and for bf16 gets the norm of tensor-parallel ranks wrong. There the norm is taken here, and
    ``deepspeed_config`` turns DeepSpeed's own clipping off.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float, device: torch.device) -> None:
        self.clip_norm = clip_norm
        self._device = device  # offloaded gradients are elsewhere, and nccl reduces nothing there
        self.expect(lambda norm: None)
        optimizer.register_step_pre_hook(self._check)

    def expect(self, judge: Judge) -> None:
        """Before each step."""
        self._judge, self.grad_norm = judge, math.inf
        self.spike: Spike | None = None

    def refuses(self, grad_norm: torch.Tensor) -> bool:
        """A collective, and the same on all ranks; ``grad_norm`` [] may differ in the last digit, -1 is not finite."""
        norm = grad_norm.detach().to(self._device, torch.float64)
        norm = torch.where(norm >= 0, norm, math.inf)
        dist.all_reduce(norm, op=dist.ReduceOp.MAX)
        self.grad_norm = float(norm)
        self.spike = self._judge(self.grad_norm)
        return self.spike is not None

    def watch(self, wrapper: Any, mpu: DeepSpeedGroups) -> None:
        """Be asked by DeepSpeed's wrapper around the optimizer when it has the norm."""
        infinite = torch.tensor(math.inf, device=self._device)
        if isinstance(wrapper, BF16_Optimizer):  # ZeRO 1
            grads_of = wrapper.get_grads_for_norm

            def asked_grads(for_clipping: bool = False) -> Any:
                if for_clipping:
                    return grads_of(for_clipping=True)
                grads, of_experts = grads_of()
                refused = self.refuses(get_global_norm_of_tensors(grads, mpu=mpu))
                return ([infinite] if refused else grads), of_experts

            wrapper.get_grads_for_norm = asked_grads
        elif isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
            norms_of_groups = wrapper._get_norm_groups

            def asked_groups() -> list[torch.Tensor]:
                norms: list[torch.Tensor] = norms_of_groups()
                return [infinite] if self.refuses(combine_grad_norm_groups(norms)) else norms

            wrapper._get_norm_groups = asked_groups
        else:  # ZeRO 1 and 2
            norm_of_all = wrapper.scaled_global_norm

            def asked() -> torch.Tensor:
                norm: torch.Tensor = norm_of_all()
                return infinite if self.refuses(norm) else norm

            wrapper.scaled_global_norm = asked

    def _check(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = torch.zeros((), device=self._device)
        for grad in grads:
            bad += (~torch.isfinite(grad).all()).to(self._device, torch.float32)
        dist.all_reduce(bad)
        if bad > 0:
            raise NonFiniteError("the gradient is not finite")
        if self.clip_norm and self.grad_norm > self.clip_norm:
            for grad in grads:
                grad *= self.clip_norm / self.grad_norm


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def apply_update(engine: deepspeed.DeepSpeedEngine, learning_rate: float, judge: Judge) -> tuple[float, Spike | None]:
    """The optimizer step at the boundary of gradient accumulation.

    Args:
        judge: is given the global gradient norm before clipping, infinite if the gradient is not finite, and says
            whether to update. What it refuses leaves weights and optimizer state as they are, and no gradients.

    Returns:
        That norm, and what the judge said.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    guard: UpdateGuard = engine.update_guard
    guard.expect(judge)
    if not engine.zero_optimization() and guard.refuses(_gradient_norm(engine.module)):
        engine.optimizer.step = lambda: None  # the rest of DeepSpeed's step clears the gradients
        engine.step()
        del engine.optimizer.step
        return guard.grad_norm, guard.spike
    engine.step()
    if getattr(engine.optimizer, "overflow", False) and guard.spike is None:  # found before the norm was taken
        guard.grad_norm, guard.spike = math.inf, judge(math.inf)
    return guard.grad_norm, guard.spike


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


def whole_output_embedding(engine: deepspeed.DeepSpeedEngine) -> AbstractContextManager[torch.Tensor]:
    """This rank's vocabulary rows [V_local, D] of the output embedding; gathers them under ZeRO 3."""
    return _whole(engine, engine.module.output_embedding)


def whole_input_embedding(engine: deepspeed.DeepSpeedEngine) -> AbstractContextManager[torch.Tensor]:
    """The same of the input embedding."""
    return _whole(engine, engine.module.input_embedding)


@contextlib.contextmanager
def _whole(engine: deepspeed.DeepSpeedEngine, weight: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    with deepspeed.zero.GatheredParameters([weight], enabled=engine.zero_optimization_partition_weights()):
        yield weight.detach()
