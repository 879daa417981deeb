"""Inputs of :mod:`agg.benchmark`, and what it compares on them.

Letters: V vocabulary, V_local rows of this rank's shard, D hidden size, T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from agg.gating import Gates, rarity_gates
from agg.linear_cross_entropy import gated_linear_cross_entropy
from agg.reference import reference_gated_cross_entropy
from agg.vocab_shard import VocabShard

Side = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # hidden, weight to loss


@dataclass(frozen=True)
class Case:
    """Inputs of one size, on one tensor-parallel rank."""

    hidden: torch.Tensor  # [T, D]
    weight: torch.Tensor  # [V_local, D]
    target: torch.Tensor  # [T]
    gates: Gates
    shard: VocabShard


def make_case(
    vocab_size: int, hidden_size: int, tokens: int, dtype: torch.dtype, device: str, shard: VocabShard
) -> Case:
    """Zipf targets; about half of the vocabulary is rare, and about one target in a hundred."""
    generator = torch.Generator().manual_seed(0)
    share = 1 / (1 + torch.arange(vocab_size, dtype=torch.float64))
    expected = torch.zeros(len(shard), dtype=torch.int64)
    expected[: shard.real] = (share * 1e6).long()[shard.start : shard.start + shard.real]
    alpha = float(share[vocab_size // 2] / share.sum() * 32_768)
    gates = rarity_gates(
        expected, tokens=int((share * 1e6).long().sum()), alpha=alpha, reference_batch_tokens=32_768, shard=shard
    )
    weight = 0.05 * torch.randn(vocab_size, hidden_size, generator=generator)
    local = torch.zeros(len(shard), hidden_size)
    local[: shard.real] = weight[shard.start : shard.start + shard.real]
    return Case(
        hidden=torch.randn(tokens, hidden_size, generator=generator).to(device, dtype),
        weight=local.to(device, dtype),
        target=torch.multinomial(share.float(), tokens, replacement=True, generator=generator).to(device),
        gates=Gates(gates.rare.to(device), gates.g1.to(device), gates.g2.to(device)),
        shard=shard,
    )


def sides_of(case: Case) -> tuple[dict[str, Side], list[str]]:
    """Name to loss; the second lists those of them that are gated."""
    target, gates, shard = case.target, case.gates, case.shard
    sides: dict[str, Side] = {
        "gated": lambda h, w: gated_linear_cross_entropy(h, w, target, gates, shard),
        "ungated": lambda h, w: gated_linear_cross_entropy(h, w, target, None, shard),
    }
    if shard.world_size > 1:
        sides.update(_megatron_side(case))
        return sides, ["gated"]
    sides["torch cross_entropy"] = lambda h, w: F.cross_entropy((h @ w.T).float(), target)
    sides["paper's form"] = lambda h, w: reference_gated_cross_entropy(h, w, target, gates)
    linear = getattr(F, "linear_cross_entropy", None)  # torch 2.13
    if linear is not None:
        options = torch.nn.LinearCrossEntropyOptions()
        sides["torch linear_cross_entropy"] = lambda h, w: linear(h, w, target)
        sides["torch linear_cross_entropy, chunked"] = lambda h, w: linear(h, w, target, options=options)
    if case.hidden.device.type == "cuda":
        sides.update(_gpu_sides(target))
    return sides, ["gated", "paper's form"]


def _gpu_sides(target: torch.Tensor) -> dict[str, Side]:
    """Fused losses of other libraries, where they are installed."""
    sides: dict[str, Side] = {}
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        sides["Liger fused linear"] = lambda h, w: liger_fused_linear_cross_entropy(h, w, target)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

        sides["Cut Cross-Entropy"] = lambda h, w: cut_cross_entropy(h, w, target)
    except ImportError:
        pass
    return sides


def _megatron_side(case: Case) -> dict[str, Side]:
    """megatron-core's vocab-parallel cross-entropy on materialised logits, where it is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional libraries that it looks for
        try:
            from megatron.core import parallel_state
            from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, vocab_parallel_cross_entropy
        except ImportError:
            return {}
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=case.shard.world_size, create_gloo_process_groups=False
        )

    def side(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = copy_to_tensor_model_parallel_region(hidden) @ weight.T
        loss: torch.Tensor = vocab_parallel_cross_entropy(logits, case.target).mean()
        return loss

    return {"megatron-core vocab-parallel": side}


def bare_matmuls(case: Case) -> Callable[[], None]:
    """The floor: the three matmuls of these shapes, whole, without anything around them."""
    logits = torch.empty(len(case.hidden), len(case.weight), dtype=case.weight.dtype, device=case.weight.device)
    hidden_grad, weight_grad = torch.empty_like(case.hidden), torch.empty_like(case.weight)

    def run() -> None:
        torch.mm(case.hidden, case.weight.T, out=logits)
        torch.mm(logits, case.weight, out=hidden_grad)
        torch.mm(logits.T, case.hidden, out=weight_grad)

    return run
