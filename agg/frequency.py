"""How often each token was a target during the last K optimizer steps, over all data-parallel ranks.

Letters: K window in optimizer steps, R data-parallel ranks, V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

from typing import Any

import torch

from agg.host_copy import HostCopy
from agg.step_counts import STATE_VERSION, StepCounts

Slot = tuple[torch.Tensor, torch.Tensor]  # rows, the last of which may be V_local, and their counts; int32, on the CPU
# Of saved steps, by slot: the count of all targets; by their first ids the ends and slots of pieces of the vocabulary.
Kept = dict[int, tuple[torch.Tensor, dict[int, tuple[int, Slot]]]]


class TokenFrequency(StepCounts):
    """Exact counts over a sliding window of optimizer steps, int64.

    Each step costs one integer all-reduce of ``V_local + 5`` over the data-parallel group: the step's own
    histogram, minus the histogram that leaves the window. Step ``s`` lives in slot ``s % K``, and slot ``j`` is
    kept, sparse and in host memory, by data-parallel rank ``j % R`` alone, so the rank that stores a new step is the
    one that held the step it replaces.

    Arguments and errors: :class:`~agg.step_counts.StepCounts`.
    """

    _totals_dtype = torch.int64
    _kind = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._slots: dict[int, Slot] = {}
        self._arriving: tuple[int, HostCopy] | None = None

    def _outgoing(self, histogram: torch.Tensor) -> torch.Tensor:
        leaving = self._stored().get(self._updates % self.window_steps)
        if leaving is not None:
            rows, counts = (_to_device(part, histogram.device) for part in leaving)
            histogram.index_add_(0, rows, counts, alpha=-1)
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
        self._totals = self._totals + delta  # anew: who has asked for counts keeps what they were
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

    def _take_back(self, undo: tuple[int, torch.Tensor, Slot | None]) -> None:
        slot, delta, leaving = undo
        assert self._totals is not None
        self._totals = self._totals - delta
        slots = self._stored()
        slots.pop(slot, None)
        if leaving is not None:
            slots[slot] = leaving

    def state_dict(self) -> dict[str, Any]:
        totals = self._settled().cpu()
        slots = self._stored()
        order = sorted(slots)
        empty = torch.empty(0, dtype=torch.int32, device="cpu")
        lengths = [len(slots[slot][0]) for slot in order]
        return {
            "version": STATE_VERSION,
            "window_steps": self.window_steps,
            "vocab_size": self.shard.vocab_size,
            "start": self.shard.start,
            "stop": self.shard.stop,
            "updates": self._updates,
            "totals": totals.clone(),
            "slots": torch.tensor(order, dtype=torch.int64, device="cpu"),
            "lengths": torch.tensor(lengths, dtype=torch.int64, device="cpu"),
            "rows": torch.cat([empty, *(slots[slot][0] for slot in order)]),
            "counts": torch.cat([empty, *(slots[slot][1] for slot in order)]),
        }

    def _keep(self, kept: Kept, part: dict[str, Any]) -> None:
        low, high = max(self.shard.start, part["start"]), min(self.shard.stop, part["stop"])
        ends, rows, all_counts = part["lengths"].cumsum(0), part["rows"].cpu(), part["counts"].cpu()
        for slot, end, length in zip(part["slots"].tolist(), ends.tolist(), part["lengths"].tolist(), strict=True):
            if slot % self._world_size != self._rank:
                continue
            ids = rows[end - length : end].long() + part["start"]
            counts = all_counts[end - length : end]
            _, pieces = kept.setdefault(slot, (counts[ids == part["stop"]], {}))
            if low < high:
                here = (ids >= low) & (ids < high)
                pieces[low] = (high, ((ids[here] - self.shard.start).to(torch.int32), counts[here]))

    def _resume(self, updates: int, kept: Kept) -> None:
        owned = [slot for slot in range(min(updates, self.window_steps)) if slot % self._world_size == self._rank]
        self._slots = {slot: self._joined(slot, kept) for slot in owned}
        self._arriving = None

    def _joined(self, slot: int, kept: Kept) -> Slot:
        """One step of the window, from pieces that must follow one another."""
        of_all, pieces = kept.get(slot, (None, {}))
        at, stop = self.shard.start, self.shard.start + self.shard.real
        while at in pieces:
            at = pieces[at][0]
        if of_all is None or at < stop:
            raise ValueError(
                f"the saved token counts lack step slot {slot} of ids {at} to {stop}; give the parts of all ranks, "
                "or leave them out to count anew"
            )
        held = [pieces[low][1] for low in sorted(pieces)]
        rows = [*(rows for rows, _ in held), torch.full_like(of_all, len(self.shard))]
        return torch.cat(rows), torch.cat([*(counts for _, counts in held), of_all])


def _sparse(histogram: torch.Tensor) -> Slot:
    rows = histogram.nonzero().squeeze(1).to(torch.int32)
    return rows, histogram[rows]


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without a wait: a copy from memory that is not pinned would be one."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
