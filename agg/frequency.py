"""How often each token was a target during the last K optimizer steps, over all data-parallel ranks.

Letters: K window in optimizer steps, V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from agg.vocab_shard import VocabShard

STATE_VERSION = 1


class TokenFrequency:
    """Exact counts over a sliding window of optimizer steps.

    Each step costs one integer all-reduce of ``V_local + 2`` over the data-parallel group: the step's own
    histogram, minus the histogram that leaves the window. Step ``s`` lives in slot ``s % K``, and slot ``j`` is
    kept, sparse, by data-parallel rank ``j % world_size`` alone, so the rank that stores a new step is the one
    that held the step it replaces.

    Args:
        shard: the vocabulary rows to count.
        window_steps: K.
        data_parallel_group: ranks that see other parts of the same global batch; None: this rank sees all of it.

    Raises:
        ValueError: ``window_steps`` below 1.
    """

    def __init__(
        self, shard: VocabShard, window_steps: int, data_parallel_group: dist.ProcessGroup | None = None
    ) -> None:
        if window_steps < 1:
            raise ValueError(f"window_steps is {window_steps}, must be at least 1")
        self.shard = shard
        self.window_steps = window_steps
        self._group = data_parallel_group
        self._rank = 0 if data_parallel_group is None else dist.get_rank(data_parallel_group)
        self._world_size = 1 if data_parallel_group is None else dist.get_world_size(data_parallel_group)
        self._updates = 0
        self._totals: torch.Tensor | None = None  # int64 [V_local + 1], the last entry counts all targets
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # slot -> rows, counts; rows may be V_local
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None
        self._undo: tuple[int, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None] | None = None

    @property
    def steps(self) -> int:
        """Steps counted so far, at most ``window_steps``."""
        return min(self._updates, self.window_steps)

    @property
    def appearances(self) -> torch.Tensor:
        """int64 [V_local]: occurrences as a target in the window, all data-parallel ranks."""
        return self._settled()[:-1]

    @property
    def tokens(self) -> torch.Tensor:
        """int64 []: targets counted in the window, all data-parallel ranks, whole vocabulary."""
        return self._settled()[-1]

    def update(self, targets: torch.Tensor, ignore_index: int = -100) -> None:
        """Count one optimizer step. The all-reduce runs in the background until a count is read.

        Args:
            targets: global ids of any shape, all targets of this rank in this step. Every data-parallel rank
                calls once per step, with an empty tensor if it has none. Fewer than 2**31 over all ranks.
            ignore_index: targets with this value are not counted.

        Raises:
            ValueError: when the counts are next read, on all ranks of the group, if any of them gave an id
                outside the vocabulary.
        """
        totals = self._settled(targets.device)
        if totals.device != targets.device:  # loaded from a checkpoint
            totals = self._totals = totals.to(targets.device)
            self._slots = {
                slot: (rows.to(targets.device), n.to(targets.device)) for slot, (rows, n) in self._slots.items()
            }
        delta = step_histogram(targets, self.shard, ignore_index)
        slot = self._updates % self.window_steps
        leaving = self._slots.get(slot)
        if leaving is not None:
            delta.index_add_(0, leaving[0], -leaving[1])
        work = dist.all_reduce(delta, group=self._group, async_op=True) if self._world_size > 1 else None
        self._pending = (work, delta)

    def undo_update(self) -> None:
        """Take back the last update, for a step that was skipped. Only one can be taken back.

        Raises:
            RuntimeError: there is none to take back.
        """
        totals = self._settled()
        if self._undo is None:
            raise RuntimeError("no update to take back: only the last one can be undone, and only once")
        slot, delta, leaving = self._undo
        totals -= delta
        self._updates -= 1
        self._slots.pop(slot, None)
        if leaving is not None:
            self._slots[slot] = leaving
        self._undo = None

    def _settled(self, device: torch.device | None = None) -> torch.Tensor:
        """The totals, after the all-reduce under way has been added."""
        if self._totals is None:
            self._totals = torch.zeros(len(self.shard) + 1, dtype=torch.int64, device=device)
        if self._pending is None:
            return self._totals
        work, delta = self._pending
        if work is not None:
            work.wait()
        self._pending = None
        delta = checked_histogram(delta, self.shard)
        slot = self._updates % self.window_steps
        leaving = self._slots.pop(slot, None)
        if slot % self._world_size == self._rank:
            histogram = delta.clone()
            if leaving is not None:
                histogram.index_add_(0, leaving[0], leaving[1])
            rows = histogram.nonzero().squeeze(1).to(torch.int32)
            self._slots[slot] = (rows, histogram[rows])
        self._totals += delta
        self._updates += 1
        self._undo = (slot, delta, leaving)
        return self._totals

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of the state, on the CPU; the parts of all ranks together are the whole window."""
        totals = self._settled().cpu()
        order = sorted(self._slots)
        empty = torch.empty(0, dtype=torch.int32)
        rows = [self._slots[slot][0].cpu() for slot in order]
        return {
            "version": STATE_VERSION,
            "window_steps": self.window_steps,
            "vocab_size": self.shard.vocab_size,
            "start": self.shard.start,
            "stop": self.shard.stop,
            "updates": self._updates,
            "totals": totals.clone(),
            "slots": torch.tensor(order, dtype=torch.int64),
            "lengths": torch.tensor([len(part) for part in rows], dtype=torch.int64),
            "rows": torch.cat([empty, *rows]),
            "counts": torch.cat([empty, *(self._slots[slot][1].cpu() for slot in order)]),
        }

    def load_state_dict(self, states: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Continue from saved parts. Counts move to the device of the next targets.

        Args:
            states: the part of this rank if the layout is the one that saved; the parts of all ranks, in any
                order, if the data-parallel or tensor-parallel degree changed.

        Raises:
            ValueError: another window, vocabulary or version, or parts that do not cover this rank's rows and slots.
        """
        parts = [states] if isinstance(states, dict) else list(states)
        self._check_parts(parts)
        updates = parts[0]["updates"]
        size, start = len(self.shard), self.shard.start
        totals = torch.zeros(size + 1, dtype=torch.int64)
        totals[-1] = parts[0]["totals"][-1]
        covered = torch.zeros(size, dtype=torch.bool)
        for part in parts:
            low, high = max(start, part["start"]), min(self.shard.stop, part["stop"])
            if low < high:
                totals[low - start : high - start] = part["totals"][low - part["start"] : high - part["start"]]
                covered[low - start : high - start] = True
        if not bool(covered[: self.shard.real].all()):
            raise ValueError(
                f"the saved token counts do not cover ids {start} to {start + self.shard.real}; "
                "give the parts of all tensor-parallel ranks"
            )
        owned = [slot for slot in range(min(updates, self.window_steps)) if slot % self._world_size == self._rank]
        self._slots = {slot: self._merge_slot(slot, parts) for slot in owned}
        self._totals, self._updates, self._pending, self._undo = totals, updates, None, None

    def _check_parts(self, parts: Sequence[dict[str, Any]]) -> None:
        if not parts:
            raise ValueError("no saved token counts were given")
        for part in parts:
            for key, expected in (
                ("version", STATE_VERSION),
                ("window", None),
                ("window_steps", self.window_steps),
                ("vocab_size", self.shard.vocab_size),
                ("updates", parts[0]["updates"]),
            ):
                if part.get(key) != expected:
                    raise ValueError(f"saved token counts have {key} {part.get(key)}, this run has {expected}")

    def _merge_slot(self, slot: int, parts: Sequence[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
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
        rows = histogram.nonzero().squeeze(1).to(torch.int32)
        return rows, histogram[rows]


def step_histogram(targets: torch.Tensor, shard: VocabShard, ignore_index: int) -> torch.Tensor:
    """int32 [V_local + 2]: occurrences of each row, then how many targets, then how many outside the vocabulary."""
    size = len(shard)
    flat = targets.reshape(-1)
    flat = flat[flat != ignore_index]
    valid = (flat >= 0) & (flat < shard.vocab_size)
    histogram = torch.zeros(size + 2, dtype=torch.int32, device=targets.device)
    rows = flat - shard.start
    rows = rows[valid & (rows >= 0) & (rows < size)]
    histogram[:size] = torch.bincount(rows, minlength=size)
    histogram[size] = flat.numel()
    histogram[size + 1] = flat.numel() - valid.sum()
    return histogram


def checked_histogram(histogram: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """[V_local + 1]: without the last entry, which must be 0 on all ranks.

    Raises:
        ValueError: some rank had targets outside the vocabulary.
    """
    if histogram.device.type != "cpu":
        torch._assert_async(histogram[-1] == 0)  # reading it would stall the device
    elif histogram[-1] > 0:
        raise ValueError(
            f"{int(histogram[-1])} targets of this step are outside the vocabulary of {shard.vocab_size} ids"
        )
    return histogram[:-1]
