"""How often each token was a target, with a memory that fades: O(V_local) however long the window.

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

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._before: torch.Tensor | None = None

    def _apply(self, delta: torch.Tensor) -> None:
        assert self._totals is not None
        self._before = self._totals
        self._totals = self._totals * (1 - 1 / self.window_steps) + delta

    def _forget_undo(self) -> None:
        self._before = None

    def undo_update(self) -> None:
        self._settled()
        if self._before is None:
            raise RuntimeError("no update to take back: only the last one can be undone, and only once")
        self._totals, self._before = self._before, None
        self._updates -= 1

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

    def _keep(self, kept: None, part: dict[str, Any]) -> None:
        """Totals are all there is."""

    def _resume(self, updates: int, kept: None) -> None:
        self._before = None
