"""Inputs of :mod:`agg.benchmark`, and what it compares on them.

Letters: V vocabulary, V_local rows of this rank's shard, D hidden size, T tokens.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from agg.gating import Gates, rarity_gates
from agg.linear_cross_entropy import gated_linear_cross_entropy
from agg.reference import reference_gated_cross_entropy
from agg.vocab_shard import VocabShard

Side = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # hidden, weight to loss
OURS = ("gated", "ungated")
LIBRARIES = {"Liger": "liger_kernel", "Cut": "cut_cross_entropy"}  # by the first word of their sides' names
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class Case:
    """Inputs of one size, on one tensor-parallel rank."""

    hidden: torch.Tensor  # [T, D]
    weight: torch.Tensor  # [V_local, D]
    target: torch.Tensor  # [T]
    gates: Gates
    shard: VocabShard
    alpha: float  # that the gates were made with, in occurrences per 32,768 tokens


def make_case(
    vocab_size: int, hidden_size: int, tokens: int, dtype: torch.dtype, device: str, shard: VocabShard
) -> Case:
    """Zipf targets; about half of the vocabulary is rare, and so is about one target in sixteen.

    Everything is drawn whole on every rank from one seed, so that ranks hold parts of the same problem.
    """
    generator = torch.Generator().manual_seed(0)
    share = 1 / (1 + torch.arange(vocab_size, dtype=torch.float64))
    counts = (share * 1e6).long()
    alpha = float(share[vocab_size // 2] / share.sum() * 32_768)
    rows, padding = slice(shard.start, shard.start + shard.real), len(shard) - shard.real
    gates = rarity_gates(
        F.pad(counts[rows], (0, padding)).to(device),
        tokens=int(counts.sum()),
        alpha=alpha,
        reference_batch_tokens=32_768,
        shard=shard,
    )
    weight = torch.randn(vocab_size, hidden_size, generator=generator).mul_(0.05)
    return Case(
        hidden=torch.randn(tokens, hidden_size, generator=generator).to(device, dtype),
        weight=F.pad(weight[rows], (0, 0, 0, padding)).to(device, dtype),
        target=torch.multinomial(share.float(), tokens, replacement=True, generator=generator).to(device),
        gates=gates,
        shard=shard,
        alpha=alpha,
    )


def run_side(case: Case, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """dH [T, D] and dW [V_local, D] of one forward and backward."""
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    side(hidden, weight).backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


def sides_of(case: Case) -> tuple[dict[str, Side], list[str]]:
    """Name to loss; the second lists those of them that are gated."""
    target, gates, shard = case.target, case.gates, case.shard
    sides: dict[str, Side] = {
        "gated": lambda h, w: gated_linear_cross_entropy(h, w, target, gates, shard),
        "ungated": lambda h, w: gated_linear_cross_entropy(h, w, target, None, shard),
    }
    sides.update(_megatron_side(case))
    if shard.world_size > 1:
        return sides, ["gated"]
    sides["torch cross_entropy"] = lambda h, w: F.cross_entropy((h @ w.T).float(), target)
    sides["paper's form"] = lambda h, w: reference_gated_cross_entropy(h, w, target, gates)
    sides["torch linear_cross_entropy"] = lambda h, w: F.linear_cross_entropy(h, w, target)
    sides["torch linear_cross_entropy, chunked"] = lambda h, w: F.linear_cross_entropy(
        h, w, target, options=torch.nn.LinearCrossEntropyOptions()
    )
    if case.hidden.device.type == "cuda":
        sides.update(_gpu_sides(target, case.hidden.dtype))
    return sides, ["gated", "paper's form"]


def missing_library(name: str) -> str | None:
    """Why a side can't be run here, whatever its size; None: it can."""
    library = LIBRARIES.get(name.split()[0])
    if library is not None and importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    if name.startswith("torch linear_cross_entropy") and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has none"
    return None


def _gpu_sides(target: torch.Tensor, dtype: torch.dtype) -> dict[str, Side]:
    """Fused losses of ``LIBRARIES``: as they come, and with the most exact sums that they offer."""

    def liger(hidden: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        loss: torch.Tensor = liger_fused_linear_cross_entropy(hidden, weight, target, **options)
        return loss

    def cut(hidden: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        from cut_cross_entropy import linear_cross_entropy

        loss: torch.Tensor = linear_cross_entropy(hidden, weight, target, **options)
        return loss

    sides: dict[str, Side] = {
        "Liger fused linear": liger,
        "Liger fused linear, float32 sums": partial(liger, accum_dtype=torch.float32),
    }
    if dtype in (torch.float16, torch.bfloat16):  # Cut Cross-Entropy takes no other
        sides |= {"Cut Cross-Entropy": cut, "Cut Cross-Entropy, filter_eps=None": partial(cut, filter_eps=None)}
    return sides


def _megatron_side(case: Case) -> dict[str, Side]:
    """megatron-core's vocab-parallel cross-entropy on materialised logits, where it is installed.

    It works on process groups, also alone: see :func:`world_of_one`.
    """
    if not dist.is_initialized():
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optional libraries that it looks for
        try:
            from megatron.core import parallel_state
            from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, vocab_parallel_cross_entropy
        except ImportError:
            return {}
    shard = case.shard
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=shard.world_size, create_gloo_process_groups=False
        )

    def side(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = copy_to_tensor_model_parallel_region(hidden) @ weight.T
        if shard.real < len(shard):  # ids that only pad take no part, as in the other sides
            with torch.no_grad():
                logits[:, shard.real :] = -torch.inf
        loss: torch.Tensor = vocab_parallel_cross_entropy(logits, case.target).mean()
        return loss

    return {"megatron-core vocab-parallel": side}


@contextmanager
def world_of_one(device: str) -> Iterator[None]:
    """torch.distributed with this process alone, unless it is initialised already; taken down at the end."""
    if dist.is_initialized() or not dist.is_available():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(BACKENDS[device], init_method=f"file://{folder}/world", rank=0, world_size=1)
        try:
            yield
        finally:
            parallel_state = sys.modules.get("megatron.core.parallel_state")
            if parallel_state is not None:
                parallel_state.destroy_model_parallel()
                for name, value in list(vars(parallel_state).items()):
                    # It forgets some, and a process that is forked later would wait for their threads for ever.
                    if isinstance(value, dist.ProcessGroup):
                        setattr(parallel_state, name, None)
            dist.destroy_process_group()


def bare_matmuls(case: Case) -> Callable[[], None]:
    """The floor: the three matmuls of these shapes, whole, without anything around them."""
    logits = torch.empty(len(case.hidden), len(case.weight), dtype=case.weight.dtype, device=case.weight.device)
    hidden_grad, weight_grad = torch.empty_like(case.hidden), torch.empty_like(case.weight)

    def run() -> None:
        torch.mm(case.hidden, case.weight.T, out=logits)
        torch.mm(logits, case.weight, out=hidden_grad)
        torch.mm(logits.T, case.hidden, out=weight_grad)

    return run
