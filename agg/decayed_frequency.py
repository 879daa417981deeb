"""How often each token was a target, with a memory that fades: as large however long the window.

Letters: K window in optimizer steps, V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

from typing import Any

import torch

from agg.step_counts import STATE_VERSION, StepCounts


class DecayedTokenFrequency(StepCounts):
    """As :class:`~agg.TokenFrequency`, but each step counts ``1 - 1 / K`` times as much as the one after it.

    A token that occurs steadily has the same rarity in both; one that stopped fades over about K steps instead of
    leaving after exactly K. Counts are float64 sums of integers that were reduced exactly, so they are the same on
    every layout.
    """

    _totals_dtype = torch.float64
    _kind = "exponential"

    def _apply(self, delta: torch.Tensor) -> None:
        assert self._totals is not None
        self._undo = self._totals
        self._totals = self._totals * (1 - 1 / self.window_steps) + delta

    def _take_back(self, undo: torch.Tensor) -> None:
        self._totals = undo

    def state_dict(self) -> dict[str, Any]:
        totals = self._settled().cpu().clone()
        return {
            "version": STATE_VERSION,
            "window": self._kind,
            "window_steps": self.window_steps,
            "vocab_size": self.shard.vocab_size,
            "start": self.shard.start,
            "stop": self.shard.stop,
            "updates": self._updates,
            "totals": totals,
        }

    def _keep(self, kept: dict[int, Any], part: dict[str, Any]) -> None:
        """Totals are all there is."""

    def _resume(self, updates: int, kept: dict[int, Any]) -> None:
        """Likewise."""
