"""How often each token was a target, with a memory that fades: O(V_local) however long the window.

Letters: K window in optimizer steps, V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from agg.frequency import STATE_VERSION, checked_histogram, step_histogram
from agg.vocab_shard import VocabShard


class DecayedTokenFrequency:
    """As :class:`~agg.TokenFrequency`, but each step counts ``1 - 1 / K`` times as much as the one after it.

    A token that occurs steadily has the same rarity in both; one that stopped fades over about K steps instead of
    leaving after exactly K. Counts are float64 sums of integers that were reduced exactly, so they are the same on
    every layout.
    """

    def __init__(
        self, shard: VocabShard, window_steps: int, data_parallel_group: dist.ProcessGroup | None = None
    ) -> None:
        if window_steps < 1:
            raise ValueError(f"window_steps is {window_steps}, must be at least 1")
        self.shard = shard
        self.window_steps = window_steps
        self._group = data_parallel_group
        self._world_size = 1 if data_parallel_group is None else dist.get_world_size(data_parallel_group)
        self._updates = 0
        self._totals: torch.Tensor | None = None  # float64 [V_local + 1], the last entry counts all targets
        self._before: torch.Tensor | None = None
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None

    @property
    def steps(self) -> int:
        """Steps counted so far, at most ``window_steps``."""
        return min(self._updates, self.window_steps)

    @property
    def appearances(self) -> torch.Tensor:
        """float64 [V_local]: faded occurrences as a target, all data-parallel ranks."""
        return self._settled()[:-1]

    @property
    def tokens(self) -> torch.Tensor:
        """float64 []: faded count of all targets, all data-parallel ranks, whole vocabulary."""
        return self._settled()[-1]

    def update(self, targets: torch.Tensor, ignore_index: int = -100) -> None:
        """Count one optimizer step; see :meth:`agg.TokenFrequency.update`."""
        totals = self._settled(targets.device)
        if totals.device != targets.device:  # loaded from a checkpoint
            self._totals = totals.to(targets.device)
        histogram = step_histogram(targets, self.shard, ignore_index)
        work = dist.all_reduce(histogram, group=self._group, async_op=True) if self._world_size > 1 else None
        self._pending = (work, histogram)

    def undo_update(self) -> None:
        """Take back the last update, for a step that was skipped. Only one can be taken back.

        Raises:
            RuntimeError: there is none to take back.
        """
        self._settled()
        if self._before is None:
            raise RuntimeError("no update to take back: only the last one can be undone, and only once")
        self._totals, self._before = self._before, None
        self._updates -= 1

    def _settled(self, device: torch.device | None = None) -> torch.Tensor:
        if self._totals is None:
            self._totals = torch.zeros(len(self.shard) + 1, dtype=torch.float64, device=device)
        if self._pending is None:
            return self._totals
        work, histogram = self._pending
        if work is not None:
            work.wait()
        self._pending = None
        step = checked_histogram(histogram, self.shard)
        self._before = self._totals
        self._totals = self._totals * (1 - 1 / self.window_steps) + step
        self._updates += 1
        return self._totals

    def state_dict(self) -> dict[str, Any]:
        """This rank's rows, on the CPU."""
        return {
            "version": STATE_VERSION,
            "window": "exponential",
            "window_steps": self.window_steps,
            "vocab_size": self.shard.vocab_size,
            "start": self.shard.start,
            "stop": self.shard.stop,
            "updates": self._updates,
            "totals": self._settled().cpu().clone(),
        }

    def load_state_dict(self, states: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Continue from this rank's part, or from the parts of all ranks of another layout.

        Raises:
            ValueError: another kind of window, or parts that do not cover this rank's rows.
        """
        parts = [states] if isinstance(states, dict) else list(states)
        start, stop = self.shard.start, self.shard.stop
        totals = torch.zeros(len(self.shard) + 1, dtype=torch.float64)
        covered = torch.zeros(len(self.shard), dtype=torch.bool)
        for part in parts:
            for key, expected in (
                ("version", STATE_VERSION),
                ("window", "exponential"),
                ("window_steps", self.window_steps),
                ("vocab_size", self.shard.vocab_size),
            ):
                if part.get(key) != expected:
                    raise ValueError(f"saved token counts have {key} {part.get(key)}, this run has {expected}")
            low, high = max(start, part["start"]), min(stop, part["stop"])
            if low < high:
                totals[low - start : high - start] = part["totals"][low - part["start"] : high - part["start"]]
                covered[low - start : high - start] = True
                totals[-1], self._updates = part["totals"][-1], part["updates"]
        if not bool(covered[: self.shard.real].all()):
            raise ValueError(f"the saved token counts do not cover ids {start} to {start + self.shard.real}")
        self._totals, self._before, self._pending = totals, None, None
