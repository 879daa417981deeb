"""What one pass over a loss call leaves for its backward: sums in float32, whose scale is not known before.

Letters: T tokens, D hidden size, V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agg import kernels


@dataclass(frozen=True)
class GradientSums:
    """The gradients up to a scale, in float32 at least.

    Of a mean or a sum, whose scale comes in backward, rounding to the dtype of the inputs is the last thing done: what
    would underflow in float16 meets its loss scaler before.

    Attributes:
        losses: [T], 0 where ignored.
        hidden: [T, D], complete on all tensor-parallel ranks; None: not asked for.
        weight: [V_local, D] or None. weight_factor: [V_local], what its rows still lack; None: nothing.
        dtype: of the inputs.
    """

    losses: torch.Tensor
    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    weight_factor: torch.Tensor | None
    dtype: torch.dtype

    def gradients(self, scale: torch.Tensor, keep: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """dH [T, D] and dW [V_local, D], each in one pass over memory.

        Args:
            scale: [], of all losses.
            keep: the sums are needed again; else a gradient of their dtype is formed in place, since a copy of dW
                would be the peak of memory.
        """
        return self._scaled(self.hidden, scale, None, keep), self._scaled(self.weight, scale, self.weight_factor, keep)

    def _scaled(
        self, sums: torch.Tensor | None, scale: torch.Tensor, of_rows: torch.Tensor | None, keep: bool
    ) -> torch.Tensor | None:
        if sums is None:
            return None
        out = sums if sums.dtype == self.dtype and not keep else torch.empty_like(sums, dtype=self.dtype)
        kernels.scale_into(out, sums, scale, of_rows)
        return out
