"""One optimizer step of the gated loss on data-parallel x tensor-parallel ranks, and the answer of one process to it.

The window holds three Zipf steps and the step itself, so that gates lie strictly between 0 and 1 and the two gates of a
token differ; with one step they would be 0 or 1, and hide which of them was used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from agg import AdaptiveGradientGating, Gates, rarity_gates
from tests.agg.problems import Problem, dense_answer, make_problem

WINDOW, REFERENCE = 4, 64
OPTIONS = {"alpha": 0.5, "excluded_ids": (1, 500)}
COMPARED_EXACTLY = ("counts", "rare", "g1", "g2")
COMPARED_WITHIN = ("loss", "dH", "dW")

Answer = dict[str, torch.Tensor]
Part = tuple[int, int, Answer]  # data-parallel rank, first row of the shard


def groups(rank: int, data_parallel: int, tensor_parallel: int):
    """Neighbouring ranks share a tensor-parallel group, as in megatron-core."""
    mine = {}
    for name, ranks_of in (
        ("tp", [[d * tensor_parallel + t for t in range(tensor_parallel)] for d in range(data_parallel)]),
        ("dp", [[d * tensor_parallel + t for d in range(data_parallel)] for t in range(tensor_parallel)]),
    ):
        for ranks in ranks_of:
            group = dist.new_group(ranks)
            if rank in ranks:
                mine[name] = group
    return mine["dp"], mine["tp"]


def zipf_steps(steps: int, tokens: int = 1024, vocab_size: int = 507) -> torch.Tensor:
    """Targets [steps, tokens]: low ids often, high ones once or twice in a thousand, every ninth ignored."""
    generator = torch.Generator().manual_seed(5)
    targets = (vocab_size * torch.rand(steps, tokens, generator=generator) ** 3).long()
    targets[:, ::9] = -100
    targets[2, : tokens // 4] = -100  # with 4 data-parallel ranks one of them has no valid target
    return targets


def history() -> torch.Tensor:
    """One step more than stays in the window beside the step itself."""
    return zipf_steps(WINDOW)


def step_problem() -> Problem:
    """The step: 64 tokens, of which the first of four data-parallel ranks has no valid target."""
    problem = make_problem(tokens=64, ignored=0.0)
    problem.target[:16] = -100
    return problem


def step_counts() -> torch.Tensor:
    """int64 [512]: a plain recount of what the window holds after the step."""
    seen = torch.cat([history()[1:].flatten(), step_problem().target])
    return torch.bincount(seen[seen >= 0], minlength=512)


def step_gates(counts: torch.Tensor, options: dict[str, Any]) -> Gates:
    shard = step_problem().shard(0, 1)
    return rarity_gates(counts, tokens=int(counts.sum()), reference_batch_tokens=REFERENCE, shard=shard, **options)


def papers_answer(options: dict[str, Any] = OPTIONS, dtype: torch.dtype = torch.float64) -> Answer:
    """The whole step by the paper's formula."""
    counts = step_counts()
    gates = step_gates(counts, options)
    problem = step_problem()
    problem = dataclasses.replace(
        problem, hidden=problem.hidden.to(dtype), weight=problem.weight.to(dtype), gates=gates
    )
    loss, hidden_grad, weight_grad = dense_answer(problem, reduction="sum")
    return _answer(counts, gates, loss, hidden_grad, weight_grad)


def part_of_step(
    rank: int,
    world_size: int,
    data_parallel: int,
    tensor_parallel: int,
    micro_batches: Sequence[int] = (1,),
    dtype: torch.dtype = torch.float64,
    options: dict[str, Any] = OPTIONS,
    device: str = "cpu",
) -> Part:
    """What this rank has of the step after its micro-batches, whose sizes stand in the given ratio; on a CPU."""
    layout = (*groups(rank, data_parallel, tensor_parallel), data_parallel, tensor_parallel)
    return _part_of_step(*layout, micro_batches, dtype, options, device)


def _part_of_step(dp_group, tp_group, data_parallel, tensor_parallel, micro_batches, dtype, options, device) -> Part:
    dp_rank, tp_rank = (0 if group is None else dist.get_rank(group) for group in (dp_group, tp_group))
    problem = step_problem()
    shard = problem.shard(tp_rank, tensor_parallel, tp_group)
    module = AdaptiveGradientGating(
        shard, window_steps=WINDOW, reference_batch_tokens=REFERENCE, data_parallel_group=dp_group, **options
    )
    for targets in history().to(device):
        module.begin_step(targets.chunk(data_parallel)[dp_rank])
    target = problem.target.to(device).chunk(data_parallel)[dp_rank]
    hidden = problem.hidden.chunk(data_parallel)[dp_rank].to(device, dtype, copy=True).requires_grad_()
    weight = problem.weight[shard.start : shard.stop].to(device, dtype, copy=True).requires_grad_()
    module.begin_step(target)
    sizes = [len(target) * share // sum(micro_batches) for share in micro_batches]
    total = torch.zeros((), dtype=dtype, device=device)
    for part, its_target in zip(hidden.split(sizes), target.split(sizes), strict=True):
        loss = module(part, weight, its_target, reduction="sum")
        loss.backward()
        total += loss.detach()
    if data_parallel > 1:
        dist.all_reduce(total, group=dp_group)
        dist.all_reduce(weight.grad, group=dp_group)
    counts, gates = module.frequency.appearances, module.current_gates()
    answer = _answer(counts, gates, total, hidden.grad, weight.grad)
    return dp_rank, shard.start, {name: value.cpu() for name, value in answer.items()}


def _answer(counts, gates, loss, hidden_grad, weight_grad) -> Answer:
    exact = dict(zip(COMPARED_EXACTLY, (counts, gates.rare, gates.g1, gates.g2), strict=True))
    return exact | dict(zip(COMPARED_WITHIN, (loss, hidden_grad, weight_grad), strict=True))


def errors(answer: Answer, exact: Answer) -> dict[str, float]:
    """Of a whole answer: the largest difference as a share of the largest entry."""
    return {
        name: ((answer[name].double() - exact[name]).abs().max() / exact[name].abs().max()).item()
        for name in COMPARED_WITHIN
    }


def wrong(parts: Sequence[Part], exact: Answer, tolerance: dict[str, float] | float = 1e-12) -> set[str]:
    """What differs on any rank: counts and gates at all, the others by more than ``tolerance`` of the largest entry."""
    if isinstance(tolerance, float):
        tolerance = dict.fromkeys(COMPARED_WITHIN, tolerance)
    found = set()
    for dp_rank, start, mine in parts:
        rows = slice(start, start + len(mine["counts"]))
        positions = slice(dp_rank * len(mine["dH"]), (dp_rank + 1) * len(mine["dH"]))
        for name, got in mine.items():
            whole = exact[name].double()
            expected = whole if name == "loss" else whole[positions if name == "dH" else rows]
            allowed = tolerance.get(name, 0.0) * whole.abs().max()
            if got.shape != expected.shape or not (got.double() - expected).abs().max() <= allowed:  # nor NaN
                found.add(name)
    return found
