"""The three products with the rows of an output embedding, a chunk of positions at a time.

Letters: C positions of a chunk, D hidden size, V rows.
"""

from __future__ import annotations

import torch

from agg import kernels

ALIGNED = 64  # columns: 128 bytes in 16 bits


class Projection:
    """Holds the weight and one chunk of logits, which become probabilities in place.

    On a GPU, logits of 50,257 columns take 6 to 8 times as long as those of 50,304, and ``P W`` 5 times (version 13 in
    PERFORMANCE.md). So the rows are taken in two pieces: a multiple of ``ALIGNED``, and the rest, filled up with zeros.

    Args:
        weight: [V, D]. tokens: the largest C.
    """

    def __init__(self, weight: torch.Tensor, tokens: int) -> None:
        self.weight = weight
        rows = len(weight)
        self._whole, padded = rows, rows
        if wants_alignment(weight):
            self._whole, padded = rows // ALIGNED * ALIGNED, -(-rows // ALIGNED) * ALIGNED
        self._rest: torch.Tensor | None = None
        if padded > self._whole:
            self._rest = weight.new_zeros(ALIGNED, weight.shape[1])
            self._rest[: rows - self._whole] = weight[self._whole :]
        self._buffer = weight.new_empty(tokens, padded)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[C, V], of hidden [C, D]; the next call overwrites them."""
        buffer = self._buffer[: len(hidden)]
        torch.mm(hidden, self.weight[: self._whole].T, out=buffer[:, : self._whole])
        if self._rest is not None:
            torch.mm(hidden, self._rest.T, out=buffer[:, self._whole :])
        return buffer[:, : len(self.weight)]

    def put(self, p: torch.Tensor) -> torch.Tensor:
        """``p`` [C, V], which may be of another dtype, in the place of the logits."""
        held = self._buffer[: len(p), : len(self.weight)]
        return held if p.data_ptr() == held.data_ptr() else held.copy_(p)

    def times_weight(self, tokens: int, sum_dtype: torch.dtype) -> torch.Tensor:
        """``P W`` [C, D] of what the chunk holds, in ``sum_dtype`` or, on a CPU, in that of the weight."""
        p = self._buffer[:tokens]
        if not kernels.mixed_addmm_for(p):
            return p[:, : len(self.weight)] @ self.weight
        product = p.new_empty(tokens, self.weight.shape[1], dtype=sum_dtype)
        kernels.add_product_(product, p[:, : self._whole], self.weight[: self._whole], anew=True)
        if self._rest is not None:
            kernels.add_product_(product, p[:, self._whole :], self._rest, anew=False)
        return product

    def add_transposed_(self, total: torch.Tensor, right: torch.Tensor, *, anew: bool) -> None:
        """``total += P^T right``, or ``=`` if ``anew``, with total [V, D] and right [C, D]."""
        p = self._buffer[: len(right), : len(self.weight)]
        for rows in (slice(0, self._whole), slice(self._whole, None)):
            if len(total[rows]):
                kernels.add_product_(total[rows], p[:, rows].T, right, anew=anew)


def wants_alignment(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"
