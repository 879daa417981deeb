"""How often each token was a target during the last K optimizer steps, over all data-parallel ranks.

Letters: K window in optimizer steps, R data-parallel ranks, V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from agg.host_copy import HostCopy
from agg.step_counts import STATE_VERSION, StepCounts

Slot = tuple[torch.Tensor, torch.Tensor]  # rows, the last of which may be V_local, and their counts; int32, on the CPU


class TokenFrequency(StepCounts):
    """Exact counts over a sliding window of optimizer steps, int64.

    Each step costs one integer all-reduce of ``V_local + 4`` over the data-parallel group: the step's own
    histogram, minus the histogram that leaves the window. Step ``s`` lives in slot ``s % K``, and slot ``j`` is
    kept, sparse and in host memory, by data-parallel rank ``j % R`` alone, so the rank that stores a new step is the
    one that held the step it replaces.

    Arguments and errors: :class:`~agg.step_counts.StepCounts`.
    """

    _totals_dtype = torch.int64

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._slots: dict[int, Slot] = {}
        self._arriving: tuple[int, HostCopy] | None = None
        self._undo: tuple[int, torch.Tensor, Slot | None] | None = None

    def _outgoing(self, histogram: torch.Tensor) -> torch.Tensor:
        leaving = self._stored().get(self._updates % self.window_steps)
        if leaving is not None:
            rows, counts = (_to_device(part, histogram.device) for part in leaving)
            histogram.index_add_(0, rows, -counts)
        return histogram

    def _apply(self, delta: torch.Tensor) -> None:
        assert self._totals is not None
        slot = self._updates % self.window_steps
        leaving = self._stored().pop(slot, None)
        if slot % self._world_size == self._rank:
            histogram = delta.clone()
            if leaving is not None:
                rows, counts = (_to_device(part, histogram.device) for part in leaving)
                histogram.index_add_(0, rows, counts)
            self._arriving = (slot, HostCopy(histogram))
        self._totals += delta
        self._undo = (slot, delta, leaving)

    def _stored(self) -> dict[int, Slot]:
        """The slots, after the histogram that was on its way to the host is among them.

        It was sent a step ago, so that a GPU is not waited for.
        """
        if self._arriving is not None:
            slot, histogram = self._arriving
            self._slots[slot] = _sparse(histogram.get())
            self._arriving = None
        return self._slots

    def undo_update(self) -> None:
        totals = self._settled()
        if self._undo is None:
            raise RuntimeError("no update to take back: only the last one can be undone, and only once")
        slot, delta, leaving = self._undo
        totals -= delta
        self._updates -= 1
        slots = self._stored()
        slots.pop(slot, None)
        if leaving is not None:
            slots[slot] = leaving
        self._undo = None

    def state_dict(self) -> dict[str, Any]:
        totals = self._settled().cpu()
        slots = self._stored()
        order = sorted(slots)
        empty = torch.empty(0, dtype=torch.int32)
        return {
            "version": STATE_VERSION,
            "window_steps": self.window_steps,
            "vocab_size": self.shard.vocab_size,
            "start": self.shard.start,
            "stop": self.shard.stop,
            "updates": self._updates,
            "totals": totals.clone(),
            "slots": torch.tensor(order, dtype=torch.int64),
            "lengths": torch.tensor([len(slots[slot][0]) for slot in order], dtype=torch.int64),
            "rows": torch.cat([empty, *(slots[slot][0] for slot in order)]),
            "counts": torch.cat([empty, *(slots[slot][1] for slot in order)]),
        }

    def load_state_dict(self, states: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        parts = [states] if isinstance(states, dict) else list(states)
        totals = self._merge_totals(parts, kind=None)
        updates = parts[0]["updates"]
        owned = [slot for slot in range(min(updates, self.window_steps)) if slot % self._world_size == self._rank]
        self._slots = {slot: self._merge_slot(slot, parts) for slot in owned}
        self._totals, self._updates = totals, updates
        self._pending = self._complaints = self._arriving = self._undo = None

    def _merge_slot(self, slot: int, parts: Sequence[dict[str, Any]]) -> Slot:
        """Rows of this shard and their counts in one step of the window, from the parts that hold it."""
        size, start = len(self.shard), self.shard.start
        histogram = torch.zeros(size + 1, dtype=torch.int32)
        covered = torch.zeros(size, dtype=torch.bool)
        for part in parts:
            (place,) = (part["slots"] == slot).nonzero(as_tuple=True)
            low, high = max(start, part["start"]), min(self.shard.stop, part["stop"])
            if len(place) == 0 or low >= high or bool(covered[low - start]):
                continue
            begin = int(part["lengths"][: place[0]].sum())
            chosen = slice(begin, begin + int(part["lengths"][place[0]]))
            rows, counts = part["rows"][chosen].long(), part["counts"][chosen]
            is_total = rows == part["stop"] - part["start"]
            ids = rows + part["start"]
            mine = ~is_total & (ids >= low) & (ids < high)
            histogram[ids[mine] - start] = counts[mine]
            if bool(is_total.any()):
                histogram[-1] = counts[is_total][0]
            covered[low - start : high - start] = True
        if not bool(covered[: self.shard.real].all()):
            raise ValueError(
                f"the saved token counts lack step slot {slot} of ids {start} to {start + self.shard.real}; "
                "give the parts of all ranks"
            )
        return _sparse(histogram)


def _sparse(histogram: torch.Tensor) -> Slot:
    rows = histogram.nonzero().squeeze(1).to(torch.int32)
    return rows, histogram[rows]


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without a wait: a copy from memory that is not pinned would be one."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
