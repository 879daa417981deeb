"""Whether the sides of :mod:`agg.benchmark` compute the same gradients, gating included.

Each side is held against the dense formula of one process in higher precision. Errors are taken per row, over the norm
of that row: the rows of rare ids, which gating is about, are thousands of times smaller than those of frequent ones.
How much error is allowed is measured: a few times that of torch's plain ``cross_entropy`` on materialised logits of the
same dtype, ``OUR_BUDGET`` times for our sides and ``BUDGET`` times for those of others, where a miss ends nothing.

Letters: V vocabulary, D hidden size, T tokens, C tokens of a chunk, R rows of dW that are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F

from agg.benchmark_sides import OURS, Case, Side, make_case, run_side
from agg.vocab_shard import VocabShard

OUR_BUDGET = 4.0  # 1.8 is the most that was seen, in bfloat16 with V 32k; forgotten gates take 1e3 there
# Others may keep log P in half precision, as torch's linear_cross_entropy and the paper's form do there: from -8 to -16
# it is rounded by up to 1/32, a gradient by 1/512. Seen: 11; in float32 10, by torch's chunked linear_cross_entropy.
BUDGET = 16.0
CHUNK_TOKENS = 256
MAX_ROWS = 8192  # of dW; where a shard has more, so many of them, evenly spread over its ids
MEASURES = ("row of dH", "row of dW", "rare rows of dW")

Gradients = tuple[torch.Tensor, torch.Tensor]  # dH [T, D], dW [R, D]


@dataclass(frozen=True)
class Check:
    """What became of one side.

    Attributes:
        differences: of each of MEASURES; None where it raised or its gradients are not finite.
        failure: what is wrong; None if nothing is.
    """

    differences: dict[str, float] | None
    failure: str | None


def check_gradients(case: Case, sides: dict[str, Side], gated: Sequence[str]) -> dict[str, Check]:
    """Each side against the dense answer; figures are the worst of all tensor-parallel ranks, the same on each.

    Raises:
        AssertionError: a side of ours computes something else. Those of others are only reported.
    """
    rows = rows_to_compare(case.shard.real, case.hidden.device)
    ids, rare = rows + case.shard.start, case.gates.rare[rows]
    dense = whole_case(case)
    expected = dense_gradients(dense, ids)
    plain = worst_differences(plain_gradients(dense, ids), expected[False], rare, case.shard)
    del dense
    checks = {}
    for name, side in sides.items():
        answer, failure = _answer(case, side, rows, may_raise=name in OURS)
        differences = worst_differences(answer, expected[name in gated], rare, case.shard)
        factor = OUR_BUDGET if name in OURS else BUDGET
        over = [measure for measure, value in differences.items() if not value <= factor * plain[measure]]
        if failure is None and over:
            failure = "; ".join(f"{m} off by {differences[m]:.1e}, budget {factor * plain[m]:.1e}" for m in over)
        if name in OURS and failure is not None:
            raise AssertionError(f"{name}: {failure}")
        checks[name] = Check(differences if all(map(math.isfinite, differences.values())) else None, failure)
    return checks


def _answer(case: Case, side: Side, rows: torch.Tensor, may_raise: bool) -> tuple[Gradients | None, str | None]:
    """dH and ``rows`` of dW; or None, and what was raised."""
    try:
        hidden_grad, weight_grad = run_side(case, side)
        return (hidden_grad, weight_grad[rows]), None
    except Exception as error:
        if may_raise:
            raise
        return None, describe(error)


def describe(error: Exception) -> str:
    """Its kind and its first line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def whole_case(case: Case) -> Case:
    """The same problem on one process, all rows of the vocabulary and gates that were not gathered from shards."""
    if case.shard.world_size == 1:
        return case
    vocab_size, (tokens, hidden_size) = case.shard.vocab_size, case.hidden.shape
    shard = VocabShard(0, vocab_size, vocab_size)
    return make_case(vocab_size, hidden_size, tokens, case.hidden.dtype, case.hidden.device.type, shard)


def rows_to_compare(real: int, device: torch.device) -> torch.Tensor:
    """int64 [R]: all rows of a shard, or ``MAX_ROWS`` spread evenly from its first to its last."""
    return torch.linspace(0, real - 1, min(real, MAX_ROWS), dtype=torch.float64, device=device).round().long()


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the dense answer."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64


def dense_gradients(dense: Case, ids: torch.Tensor) -> dict[bool, Gradients]:
    """Gated (True) and not, from the formula as it is written: ``dH = (P - Y) W``, ``dW = (G * (P - Y))^T H``.

    ``P - Y`` and G are whole, but of C tokens at a time, whose shares of dW add up.
    """
    exact = exact_dtype(dense.hidden.dtype)
    weight, gates = dense.weight.to(exact), dense.gates
    hidden_grad = torch.zeros_like(dense.hidden, dtype=exact)
    plain, gated = (weight.new_zeros(len(ids), weight.shape[1]) for _ in range(2))
    for chunk in torch.arange(len(dense.hidden), device=ids.device).split(CHUNK_TOKENS):
        hidden, target = dense.hidden[chunk].to(exact), dense.target[chunk][:, None]
        difference = torch.softmax(hidden @ weight.T, 1)
        difference.scatter_add_(1, target, -difference.new_ones(target.shape)).div_(len(dense.hidden))
        hidden_grad[chunk] = difference @ weight
        part = difference[:, ids]  # [C, R]
        gate = torch.where(gates.rare[target], gates.g2[ids], gates.g1[ids]).to(exact)
        gate = torch.where(target == ids, 1.0, gate)
        plain.addmm_(part.T, hidden)
        gated.addmm_((gate * part).T, hidden)
    return {False: (hidden_grad, plain), True: (hidden_grad, gated)}


def plain_gradients(dense: Case, ids: torch.Tensor) -> Gradients:
    """Of torch's cross_entropy on materialised logits, C tokens at a time: what the dtype of the inputs allows."""
    exact = exact_dtype(dense.hidden.dtype)
    hidden_grad = torch.zeros_like(dense.hidden, dtype=exact)
    weight_grad = hidden_grad.new_zeros(len(ids), hidden_grad.shape[1])
    weight = dense.weight.detach().requires_grad_()
    for chunk in torch.arange(len(dense.hidden), device=ids.device).split(CHUNK_TOKENS):
        hidden = dense.hidden[chunk].requires_grad_()
        loss = F.cross_entropy((hidden @ weight.T).float(), dense.target[chunk], reduction="sum") / len(dense.hidden)
        of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight))
        hidden_grad[chunk] = of_hidden.to(exact)
        weight_grad += of_weight[ids].to(exact)
    return hidden_grad, weight_grad


def worst_differences(
    answer: Gradients | None, expected: Gradients, rare: torch.Tensor, shard: VocabShard
) -> dict[str, float]:
    """MEASURES of ``answer``, the worst of the tensor-parallel ranks; infinite where it is None or not a number.

    The error of each row is a share of its norm. Of dH and of dW the largest is taken; of rare rows the root mean
    square too, which also sees a few per cent that all of them are off.

    Args:
        rare: bool [R].
    """
    measured = torch.full((len(MEASURES),), torch.inf, dtype=torch.float64, device=rare.device)
    if answer is not None:
        of_hidden, of_weight = (_row_errors(mine, right) for mine, right in zip(answer, expected, strict=True))
        measured[:2] = torch.stack([of_hidden.max(), of_weight.max()])
        measured[2] = of_weight[rare].square().sum().div(rare.sum().clamp(min=1)).sqrt()
    worst = shard.all_reduce(torch.where(measured.isnan(), torch.inf, measured), op=dist.ReduceOp.MAX)
    return dict(zip(MEASURES, worst.tolist(), strict=True))


def _row_errors(mine: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[rows]: the norm of the difference over that of what is right; 0 where both are 0."""
    norm: torch.Tensor = right.norm(dim=1)
    error: torch.Tensor = (mine.to(right.dtype) - right).norm(dim=1)
    return error / norm.clamp(min=torch.finfo(norm.dtype).tiny)
