"""Penalties on the rows of the output embedding, by reductions of size D over the vocabulary's shards.

Letters: D hidden size, V vocabulary, V_local rows of this rank's shard; w_k row k, u_k = w_k / |w_k|.

Each is a sum over all pairs of rows, and so the square of one vector ``s``, the same on all tensor-parallel ranks, to
which every rank adds its rows. The gradient of ``s . s`` at a rank's rows is that of ``2 s . (its own part of s)`` with
s held constant: no gradient has to cross ranks, and nothing has the shape V x V.
"""

from __future__ import annotations

import torch

from agg import VocabShard
from agg.sweep import sum_dtype


def cosine_penalty(weight: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """CosReg: ``1 / V^2 sum_k sum_{j != k} u_k . u_j = (|sum_k u_k|^2 - V) / V^2`` (Gao et al. 2019, arXiv 1907.12009).

    Args:
        weight: [V_local, D]. Rows that only pad take no part, rows of zeros have no direction.

    Returns:
        [] of value 0, whose gradient is that of the penalty.
    """
    real = weight[: shard.real].to(sum_dtype(weight.dtype))
    norms = real.norm(dim=1, keepdim=True)
    units = torch.where(norms > 0, real / norms.clamp(min=torch.finfo(norms.dtype).tiny), 0)
    return _gradient_of_square(units.sum(0), shard) / shard.vocab_size**2


def mean_penalty(weight: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """mu-loss: ``|mu|^2`` with ``mu = 1 / V sum_k w_k`` (arXiv 2601.02031).

    Args:
        weight: [V_local, D]. Rows that only pad take no part.

    Returns:
        [] of value 0, whose gradient is that of the penalty.
    """
    real = weight[: shard.real].to(sum_dtype(weight.dtype))
    return _gradient_of_square(real.sum(0), shard) / shard.vocab_size**2


def _gradient_of_square(own: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """[] of value 0, with the gradient of ``|s|^2`` at this rank's part ``own`` [D] of the sum s over its group."""
    product = 2 * (shard.all_reduce(own.detach().clone()) @ own)
    return product - product.detach()
