"""What the gates took from the gradient of some loss calls, and the loss of each token.

Letters: T tokens of one call, C of a chunk, V vocabulary, V_local rows of this rank's shard; P softmax, Y one-hot
targets, G gates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from agg.gating import Gates
from agg.vocab_shard import VocabShard


@dataclass(frozen=True)
class GatedShare:
    """What gates took from ``E = P - Y``, the gradient of the logits that trains the output embedding.

    Both are shares of sums of absolute values over all positions that are not ignored. A norm of dW itself would need
    a second dW without gates; these sums are read off the probabilities while they exist, and add up over
    positions, micro-batches and ranks, so they are exact for the global batch.

    Attributes:
        of_all: ``sum_ik (1 - G_ik) |E_ik| / sum_ik |E_ik|``, in [0, 1 / 2]: half of the sum is at the targets, which no
            gate holds.
        of_rare: the same with both sums over rare k that are not the target, so over what pushes rare rows away, in
            [0, 1]; None: nothing pushed any.
    """

    of_all: float
    of_rare: float | None


class LossProbe:
    """Give one to all loss calls of a step that is measured; it changes neither loss nor gradient.

    The gradient is taken as that of the plain cross-entropy of the logits: label smoothing, z-loss and the slope of
    ``soft_cap`` are left out. Costs one more read of the probabilities, and waits for nothing.

    Args:
        device: of the losses.

    Attributes:
        token_losses: target int64 [T] and loss [T] of each call, 0 where ignored, as the call has them.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.token_losses: list[tuple[torch.Tensor, torch.Tensor]] = []
        # gated and pushed at rare rows, both of this shard alone; |E| of all rows
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def gated_share(self, shard: VocabShard, data_parallel_group: dist.ProcessGroup | None) -> GatedShare | None:
        """Over all tensor-parallel and data-parallel ranks: collectives. None: no call had gates, or a target."""
        sums = torch.cat([shard.all_reduce(self._sums[:2].clone()), self._sums[2:]])
        if data_parallel_group is not None:
            dist.all_reduce(sums, group=data_parallel_group)
        gated, pushed, total = sums.tolist()
        return GatedShare(gated / total, gated / pushed if pushed else None) if total else None

    def add_pushes(
        self,
        columns: torch.Tensor,
        local_p: torch.Tensor,
        factor: torch.Tensor,
        losses: torch.Tensor,
        is_rare: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """Count the positions [C] of one chunk.

        Args:
            columns: of :func:`probe_columns`.
            local_p, factor: the plain P of this shard's rows is their product, [C, V_local] and [C]; 0 at targets,
                which are exempt.
            losses: of the plain cross-entropy, so that ``|E_i| = 2 - 2 P_i,y_i`` is known on all ranks.
            is_rare: whether the target is. valid: whether it is not ignored.
        """
        self._sums[2] += torch.where(valid, -2 * torch.expm1(-losses), 0).sum(dtype=torch.float64)
        if not len(columns):  # nothing but padding here
            return
        pushes = (local_p @ columns.to(local_p.dtype)).to(losses.dtype) * factor[:, None]
        gated = torch.where(is_rare, pushes[:, 2], pushes[:, 1])
        both = torch.stack([gated, pushes[:, 0]])
        self._sums[:2] += torch.where(valid, both, 0).sum(1, dtype=torch.float64)


def probe_columns(gates: Gates, real: int, dtype: torch.dtype) -> torch.Tensor:
    """[real, 3]: 1 for rare rows, ``1 - g1`` and ``1 - g2``."""
    return torch.stack([gates.rare.double(), 1 - gates.g1.double(), 1 - gates.g2.double()], 1)[:real].to(dtype)
