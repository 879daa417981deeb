"""The paper's formula as it is written: dense, one process, slow. The oracle of the tests.

Letters: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from agg.gating import Gates


def reference_gated_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    gates: Gates | None = None,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> torch.Tensor:
    """Adaptive Gradient Gating as a sum of cross-entropies over two projections (arXiv 2109.03127, equation 9).

    One projection sees the weight as a constant and so trains only ``hidden``; the other sees ``hidden`` as a
    constant, and of its logits only the share ``G`` is connected to ``weight``. The forward value of that sum is
    twice the cross-entropy; here it is reported as the plain cross-entropy.

    Args:
        hidden: [T, D]. weight: [V, D], all rows. target: int64 [T]. gates: of all V rows; None: all 1.
        vocab_size: unpadded size; rows from there on take no part. None: V.
        ignore_index, label_smoothing, reduction: as in ``torch.nn.functional.cross_entropy``.

    Returns:
        [], or [T] with reduction ``none``; in the dtype of ``hidden``.

    Raises:
        What torch raises: nothing is checked here.
    """
    weight = weight[:vocab_size]
    if gates is None:
        return F.cross_entropy(
            hidden @ weight.T, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
        )
    valid = target != ignore_index
    own = torch.where(valid, target, 0)
    target_is_rare = gates.rare[own]
    gate = torch.where(target_is_rare[:, None], gates.g2[None, :vocab_size], gates.g1[None, :vocab_size])
    gate = gate.to(hidden.dtype).scatter(1, own[:, None], 1.0)

    logits_train_hidden = hidden @ weight.detach().T
    connected = hidden.detach() @ weight.T
    logits_train_weight = gate * connected + (1 - gate) * connected.detach()

    def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(
            logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
        )

    doubled = cross_entropy(logits_train_hidden) + cross_entropy(logits_train_weight)
    return doubled - doubled.detach() / 2
