"""Random loss problems, and the dense answer in fp64 to hold candidates against."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from agg import Gates, VocabShard, rarity_gates, reference_gated_cross_entropy


@dataclass(frozen=True)
class Problem:
    """T tokens, D hidden size, V vocabulary; weight and gates have ``padded`` rows."""

    hidden: torch.Tensor  # [T, D] fp64
    weight: torch.Tensor  # [padded, D] fp64
    target: torch.Tensor  # [T]
    gates: Gates
    vocab_size: int

    def shard(self, rank: int, world_size: int, group: object = None) -> VocabShard:
        return VocabShard.of_rank(self.vocab_size, rank, world_size, group)  # type: ignore[arg-type]

    def local(self, shard: VocabShard) -> tuple[torch.Tensor, Gates]:
        rows = slice(shard.start, shard.stop)
        return self.weight[rows], Gates(self.gates.rare[rows], self.gates.g1[rows], self.gates.g2[rows])


def make_problem(
    tokens: int = 96,
    hidden_size: int = 16,
    vocab_size: int = 507,
    *,
    alpha: float = 0.3,
    ignored: float = 0.1,
    seed: int = 0,
) -> Problem:
    """A vocabulary that does not divide, Zipf counts, some ignored targets, targets of both classes."""
    generator = torch.Generator().manual_seed(seed)
    shard = VocabShard.of_rank(vocab_size, 0, 1)
    counts = (400 / (1 + torch.arange(len(shard)))).long()
    counts[vocab_size:] = 0
    gates = rarity_gates(
        counts, tokens=int(counts.sum()), alpha=alpha, reference_batch_tokens=64, shard=shard, excluded_ids=(1, 500)
    )
    target = (vocab_size * torch.rand(tokens, generator=generator) ** 3).long()
    target[torch.rand(tokens, generator=generator) < ignored] = -100
    return Problem(
        hidden=torch.randn(tokens, hidden_size, generator=generator, dtype=torch.float64),
        weight=torch.randn(len(shard), hidden_size, generator=generator, dtype=torch.float64),
        target=target,
        gates=gates,
        vocab_size=vocab_size,
    )


def well_predicted(problem: Problem) -> Problem:
    """Hidden states near the rows of their targets: with D = 64, P of 0.996 and a mean loss of 0.004."""
    own = problem.weight[problem.target.clamp(min=0)]
    return dataclasses.replace(problem, hidden=16 / own.shape[1] * own + problem.hidden / 10)


def rounded(problem: Problem, dtype: torch.dtype) -> Problem:
    """Hidden states and weights as ``dtype`` holds them, so that only what is computed of them is off."""
    hidden, weight = (x.to(dtype).double() for x in (problem.hidden, problem.weight))
    return dataclasses.replace(problem, hidden=hidden, weight=weight)


def dense_answer(
    problem: Problem, gated: bool = True, **options: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, dH, dW of the paper's formula in fp64 (for reduction none: gradients of a fixed weighted sum)."""
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    loss = reference_gated_cross_entropy(
        hidden,
        weight,
        problem.target,
        problem.gates if gated else None,
        vocab_size=problem.vocab_size,
        **options,  # type: ignore[arg-type]
    )
    weigh(loss).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in the storage of the transposed matrix."""
    return tensor.T.contiguous().T


def weigh(loss: torch.Tensor) -> torch.Tensor:
    """A scalar whose gradient differs by position, for losses of reduction none."""
    if loss.dim() == 0:
        return loss
    return (loss * torch.linspace(-1, 2, len(loss), dtype=loss.dtype, device=loss.device)).sum()
