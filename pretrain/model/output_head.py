"""From hidden states to a loss, to losses and predictions of each token, or to next-token logits.

Letters: T tokens, D hidden size, V vocabulary, V_local rows of this rank's shard.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from agg import VocabShard, gated_linear_cross_entropy

BLOCK_ROWS = 8_192  # of the vocabulary whose logits are formed at a time, for their float32 copy

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class OutputHead(torch.nn.Module):
    """Has no parameters: the output embedding belongs to the model, tied or not.

    Args:
        shard: the rows of the output embedding on this rank.
        soft_cap: of logits, see :func:`agg.gated_linear_cross_entropy`; 0: none.
    """

    def __init__(self, shard: VocabShard, soft_cap: float = 0.0) -> None:
        super().__init__()
        self.shard, self.soft_cap = shard, soft_cap
        self.loss: Loss = self._plain_loss  # the objective replaces it

    def forward(
        self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor | None, per_token: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden: [T, D]. weight: [V_local, D]. target: [T] global ids or -100; None: logits are wanted.

        Returns:
            The summed loss []; with ``per_token`` the plain cross-entropy [T] and the most likely id [T], both 0 where
            the target is -100; without ``target`` the logits [T, V] of the unpadded vocabulary.
        """
        if target is None:
            return self._all_logits(hidden, weight)
        if per_token:
            return self._of_targets(hidden, weight, target)
        return self.loss(hidden, weight, target)

    def _of_targets(
        self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions without a target cost nothing: of a sliding window's tokens they are most."""
        places = (target != -100).nonzero().squeeze(1)
        hidden, wanted = hidden[places], target[places]
        losses, predictions = torch.zeros(target.shape, device=target.device), torch.zeros_like(target)
        if len(places):
            losses[places] = self._plain_loss(hidden, weight, wanted, "none").float()
            predictions[places] = self._predictions(hidden, weight)
        return losses, predictions

    def _plain_loss(
        self, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, reduction: str = "sum"
    ) -> torch.Tensor:
        return gated_linear_cross_entropy(
            hidden, weight, target, None, self.shard, reduction=reduction, soft_cap=self.soft_cap
        )

    def _all_logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        own = torch.cat([_logits(hidden, block) for block in weight.split(BLOCK_ROWS)], dim=1)
        logits = torch.cat(list(self.shard.all_gather(own)), dim=1)[:, : self.shard.vocab_size]
        return self.soft_cap * torch.tanh(logits / self.soft_cap) if self.soft_cap else logits

    def _predictions(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """int64 [T]: the most likely id of each position; of equals the lowest, on every layout, capped or not."""
        found = []
        for chunk in hidden.split(1024):
            best = torch.full((len(chunk),), -torch.inf, device=chunk.device)
            row = torch.zeros_like(best, dtype=torch.int64)
            for start in range(0, self.shard.real, BLOCK_ROWS):
                block = weight[start : min(start + BLOCK_ROWS, self.shard.real)]
                value, place = _logits(chunk, block).max(1)
                row = torch.where(value > best, place + start, row)
                best = torch.maximum(value, best)
            values, ids = self.shard.all_gather(best), self.shard.all_gather(row + self.shard.start)
            found.append(ids.gather(0, values.argmax(0, keepdim=True))[0])
        return torch.cat(found)


def _logits(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[T, rows] in float32, whatever the inputs: products in bfloat16 tie, and the lower id would win each time."""
    return hidden.float() @ rows.float().T
